"""Every layout, micro-batch size and recomputation takes the same steps as a plain, unsharded, unfused computation.

Metrics are compared relative to the reference's value. A parameter is compared as a whole: the largest difference of
any element relative to the largest magnitude of any element of that tensor.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train.config import RunConfig
from aria_train.data.loader import Loader
from tests.distributed import run_distributed
from tests.reference import Reference
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
METRICS = ("loss", "loss/long", "loss/short", "balance_loss", "z_loss", "grad_norm")
METRICS += ("expert_load_max", "group_load_max", "router_entropy")

# (ranks, expert ranks, ranks per ZeRO group or None, micro-batch, recompute)
LAYOUTS = {
    "1 rank": (1, 1, None, 1, "none"),
    "1 rank, micro-batch 2": (1, 1, None, 2, "none"),
    "1 rank, micro-batch 4": (1, 1, None, 4, "none"),
    "1 rank, one micro-batch": (1, 1, None, 12, "none"),
    "1 rank, selective": (1, 1, None, 4, "selective"),
    "1 rank, full": (1, 1, None, 4, "full"),
    "ZeRO 2": (2, 1, None, 2, "none"),
    "EP 2": (2, 2, None, 1, "none"),
    "EP 2, selective": (2, 2, None, 2, "selective"),
    "EP 2, full": (2, 2, None, 2, "full"),
    "ZeRO 3": (3, 1, None, 2, "none"),
    "ZeRO 4": (4, 1, None, 3, "none"),
    "EP 2 x ZeRO 2": (4, 2, None, 1, "none"),
    "EP 2 x ZeRO 2, full": (4, 2, None, 3, "full"),
    "EP 4": (4, 4, None, 3, "none"),
    "2 replicas of ZeRO 2": (4, 1, 2, 1, "none"),
    "2 replicas of EP 2": (4, 2, 2, 3, "selective"),
    "EP 2, selective, compiled": (2, 2, None, 2, "selective"),
}


def configured(base: RunConfig, run_dir: Path) -> RunConfig:
    _, expert, group, micro, recompute = LAYOUTS[run_dir.name]
    compiled = "compiled" in run_dir.name
    return with_values(
        base,
        parallel={"expert_parallel_size": expert, "zero_group_size": group},
        train={"micro_batch_size": micro, "recompute": recompute, "compile": compiled, "run_dir": str(run_dir)},
    )


def train_all(configs: list[RunConfig]) -> list[dict[str, Tensor]]:
    """Trains one after the other; rank 0 returns every run's final weights, whole."""
    from aria_train.train.trainer import Trainer

    # Captured, differentiated, recomputed and sharded as ever; only the C++ compiler, a minute long, is left out.
    torch.compile = partial(torch.compile, backend="aot_eager")
    results = []
    for config in configs:
        trainer = Trainer(config)
        trainer.run()
        whole = {name: _whole(parameter) for name, parameter in trainer.state.model.named_parameters()}
        results.append(whole if dist.get_rank() == 0 else {})
    return results


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    from aria_train.model import AriaModel
    from aria_train.model.init import initialise

    model = AriaModel(config.model)
    initialise(model, config.model.init_std, config.train.seed)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("agreement")
    return tiny_config(folder / "unused", unequal_corpora(folder / "corpora"))


@pytest.fixture(scope="module")
def expected(base: RunConfig) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The reference's metrics of every step, and its final weights."""
    reference = Reference(base, initial_weights(base))
    with Loader(base) as loader:
        metrics = [reference.step(next(loader)) for _ in range(base.total_steps)]
    return metrics, reference.weights


@pytest.fixture(scope="module")
def trained(
    base: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Any], dict[str, Tensor]]]:
    """Metrics and final weights of every layout; layouts of as many ranks share their processes."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for ranks in sorted({layout[0] for layout in LAYOUTS.values()}):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == ranks]
        configs = [configured(base, folder / name) for name in names]
        weights = run_distributed(train_all, ranks, configs)[0]
        results.update({name: (read_steps(folder / name), final) for name, final in zip(names, weights, strict=True)})
    return results


def test_ranks_get_unequal_numbers_of_targets(base: RunConfig) -> None:
    """The comparison is worth something only if the shares differ."""
    for step_batches in zip(*(_targets(base, rank) for rank in range(4)), strict=True):
        assert len(set(step_batches)) > 1


def _targets(base: RunConfig, rank: int) -> list[int]:
    with Loader(base, rank, 4) as loader:
        return [sum(batch.num_targets for batch in next(loader)) for _ in range(base.total_steps)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_of_every_step_agree(name: str, trained: Any, expected: Any) -> None:
    steps, _ = trained[name]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    for line, wanted in zip(steps, expected[0], strict=True):
        for metric in METRICS:
            assert line[metric] == pytest.approx(wanted[metric], rel=TOLERANCE), (line["step"], metric)


@pytest.mark.parametrize("name", LAYOUTS)
def test_updated_parameters_agree(name: str, trained: Any, expected: Any) -> None:
    weights = trained[name][1]
    assert weights.keys() == expected[1].keys()
    for parameter, wanted in expected[1].items():
        deviation = (weights[parameter] - wanted).abs().max() / wanted.abs().max()
        assert deviation < TOLERANCE, f"{parameter} is off by {deviation:.1e}"


@pytest.mark.parametrize("key", ["balance_coefficient", "expert_balance_coefficient", "z_coefficient"])
def test_the_comparison_would_see_a_missing_term(key: str, base: RunConfig) -> None:
    """One step of the reference on two windows, under an uneven load: without a term the router ends up elsewhere."""
    with Loader(base) as loader:
        windows = next(loader)[:2]
    routers = []
    for config in (base, with_values(base, model={key: 0.0})):
        reference = Reference(config, initial_weights(config))
        reference.load = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0]).double().expand(2, 8)
        reference.step(windows)
        routers.append(reference.weights["layers.0.moe.router.weight"])
    assert (routers[0] - routers[1]).abs().max() > 10 * TOLERANCE * routers[0].abs().max()
