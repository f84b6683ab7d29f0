"""What a step held is free when the step is over: nothing waits for Python's garbage collector."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from torch import Tensor

from aria_train.config import RunConfig
from tests.distributed import run_distributed
from tests.tiny import tiny_config, unequal_corpora, with_values


def tensors_in_cycles(configs: list[RunConfig]) -> list[int]:
    """Of the second step of each run: tensors that refer to themselves by some way round."""
    from aria_train.train.trainer import Trainer

    found = []
    for config in configs:
        trainer = Trainer(config)
        trainer._step(next(trainer.loader))
        gc.collect()
        gc.disable()
        trainer._step(next(trainer.loader))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found.append(sum(isinstance(left, Tensor) for left in gc.garbage))
        gc.garbage.clear()
        gc.enable()
        trainer.close()
    return found


@pytest.mark.distributed
def test_a_step_leaves_no_tensors_in_reference_cycles(tmp_path: Path) -> None:
    base = tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"), parallel={"expert_parallel_size": 2})
    cases = (("none", "fp32"), ("selective", "fp32"), ("full", "bf16"))
    configs = [
        with_values(base, train={"micro_batch_size": 3, "recompute": recompute, "precision": precision})
        for recompute, precision in cases
    ]
    for rank in run_distributed(tensors_in_cycles, 2, configs):
        assert rank == [0, 0, 0]
