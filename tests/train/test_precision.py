"""bf16 trains: computed in bf16, while master weights, reductions and optimizer state stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train import kernels
from aria_train.config import RunConfig
from aria_train.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

pytestmark = pytest.mark.distributed


def train(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Trains one after the other; says in which precisions."""
    from aria_train.train import trainer as trainer_module

    results = []
    for config in configs:
        trainer = trainer_module.Trainer(config)
        model = trainer.state.model
        seen: dict[str, set[torch.dtype]] = {"hidden": set(), "experts": set(), "gradients": set()}
        layer = model.layers[0]
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen["hidden"].add(args[0].dtype))
        layer.moe.experts.register_forward_pre_hook(
            lambda module, _, seen=seen: seen["experts"].add(_local(module.gate_up).dtype)
        )

        def clip(parameters: list[Tensor], *args: Any, seen: Any = seen, plain: Any = clip_gradients) -> Tensor:
            seen["gradients"] |= {p.grad.dtype for p in parameters if p.grad is not None}
            return plain(parameters, *args)

        trainer_module.clip_gradients = clip
        trainer.run()
        states = trainer.state.optimizer.state.values()
        results.append(
            {
                **seen,
                "master": {_local(p).dtype for p in model.parameters()},
                "moments": {s[k].dtype for s in states for k in ("exp_avg", "exp_avg_sq")},
            }
        )
    return results


def clip_gradients(*args: Any) -> Tensor:
    from aria_train.train.optimizer import clip_gradients as plain

    return plain(*args)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


CASES = {
    # name: (ranks, expert ranks, micro-batch, recompute)
    "1 rank": (1, 1, 12, "none"),
    "1 rank, 12 micro-batches": (1, 1, 1, "full"),
    "ZeRO 2": (2, 1, 3, "none"),
    "EP 2": (2, 2, 2, "selective"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(case, precision) -> steps, and what every rank saw."""
    folder = tmp_path_factory.mktemp("precision")
    base = tiny_config(folder, unequal_corpora(folder / "corpora"))
    results = {}
    for ranks in (1, 2):
        keys = [
            (name, precision)
            for name, case in CASES.items()
            for precision in ("fp32", "bf16")
            if case[0] == ranks and (precision == "bf16" or name in ("1 rank", "ZeRO 2"))
        ]
        configs = [
            with_values(
                base,
                parallel={"expert_parallel_size": CASES[name][1]},
                train={
                    "micro_batch_size": CASES[name][2],
                    "recompute": CASES[name][3],
                    "precision": precision,
                    "run_dir": str(folder / f"{name} {precision}"),
                },
            )
            for name, precision in keys
        ]
        per_rank = run_distributed(train, ranks, configs)
        for index, (key, config) in enumerate(zip(keys, configs, strict=True)):
            results[key] = read_steps(config.train.run_dir), [rank[index] for rank in per_rank]
    return results


@pytest.mark.parametrize("name", CASES)
def test_bf16_losses_are_close_to_fp32(name: str, runs: Any) -> None:
    steps, wanted = runs[name, "bf16"][0], runs["1 rank", "fp32"][0]
    assert len(steps) == 5
    for line, other in zip(steps, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert line["balance_loss"] == pytest.approx(other["balance_loss"], rel=2e-2)
        assert line["z_loss"] == pytest.approx(other["z_loss"], rel=2e-2)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=3e-2)
    assert any(line["loss"] != other["loss"] for line, other in zip(steps, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_which_precision(name: str, runs: Any) -> None:
    for rank in runs[name, "bf16"][1]:
        assert rank["hidden"] == rank["experts"] == {torch.bfloat16}
        assert rank["gradients"] == rank["master"] == rank["moments"] == {torch.float32}


def test_fp32_is_float32_throughout(runs: Any) -> None:
    for rank in runs["ZeRO 2", "fp32"][1]:
        assert all(dtypes == {torch.float32} for dtypes in rank.values())


def test_gradients_of_many_micro_batches_add_up_in_float32(runs: Any) -> None:
    """Added up in bf16, 12 micro-batches would lose what a few of them do not."""
    few, many = (runs[name, "bf16"][0][0] for name in ("1 rank", "1 rank, 12 micro-batches"))
    assert many["grad_norm"] == pytest.approx(few["grad_norm"], rel=3e-3)


@pytest.mark.parametrize(
    ("has", "chosen", "says"), [(False, "bf16", True), (True, "bf16", False), (False, "fp32", False)]
)
def test_a_run_says_that_bf16_is_slower_on_a_cpu_without_it(
    has: bool, chosen: str, says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: has)
    Trainer(tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"), train={"precision": chosen}))
    assert ("this CPU has no instructions for" in capsys.readouterr().out) == says
