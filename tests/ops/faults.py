"""Faults put into a run from inside, and a plain way to run it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from aria_train.config import RunConfig


def run(config: RunConfig) -> None:
    from aria_train.train.session import run_stage

    run_stage(config)


def run_with_bad_steps(config: RunConfig, factors: dict[int, float], rank: int) -> None:
    """Runs a stage; in each of the given steps (from 1) one rank's objective is multiplied by a factor, such as NaN."""
    poison(factors, rank)
    run(config)


def poison(factors: dict[int, float], rank: int) -> None:
    from aria_train.train import trainer

    step, objective = trainer.Trainer._step, trainer.objective
    current = 0

    def note_step(self: Any, batches: Any) -> Any:
        nonlocal current
        current = self.state.step + 1
        return step(self, batches)

    def multiply(*args: Any) -> Tensor:
        return objective(*args) * (factors.get(current, 1.0) if dist.get_rank() == rank else 1.0)

    trainer.Trainer._step = note_step  # type: ignore[method-assign]
    trainer.objective = multiply


def run_never_seeing(config: RunConfig, steps: dict[int, int]) -> None:
    """Runs a stage that counts the given steps (from 1) without ever reading or computing their batches. A step whose
    value is not 0 also goes back, after it, to the weights of the checkpoint of that step."""
    from pathlib import Path

    from aria_train.parallel import checkpoint
    from aria_train.train import trainer

    step = trainer.Trainer._step

    def count_only(self: Any, batches: Any) -> Any:
        state = self.state
        if state.step + 1 not in steps:
            return step(self, batches)
        state.step += 1
        state.guard.skipped += 1
        back = steps[state.step]
        if back:
            self.saver.wait()
            now = state.step
            folder = checkpoint.folder_of_step(Path(config.train.run_dir), back)
            state.load(checkpoint.Entry(folder, checkpoint.read_manifest(folder)))
            state.step = now
            state.guard.skipped += now - back
        return {"step": state.step, "stage": config.stage, "loss": 0.0, "grad_norm": 0.0}

    trainer.Trainer._step = count_only  # type: ignore[method-assign]
    run(config)


def saved_tensors(folder: Any) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    import torch
    import torch.distributed.checkpoint as dcp

    from aria_train.parallel.checkpoint import reader

    stored = reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=reader(folder), no_dist=True)
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit."""
    import torch

    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing[:5]
