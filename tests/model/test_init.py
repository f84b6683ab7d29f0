"""Initial weights: what is drawn, and that every layout of ranks draws the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train.config import ModelConfig, ParallelConfig
from aria_train.model import AriaModel
from aria_train.model.init import initialise
from tests.distributed import run_distributed
from tests.tiny import MODEL

SEED = 5
FEW_EXPERTS = {**MODEL, "num_experts": 2, "num_layers": 1}
LAYOUTS: dict[str, tuple[int, int, int | None, dict[str, Any]]] = {
    # name: (ranks, expert ranks, ranks per ZeRO group, model)
    "1 rank": (1, 1, None, MODEL),
    "ZeRO 2": (2, 1, None, MODEL),
    "EP 2": (2, 2, None, MODEL),
    "ZeRO 3, uneven": (3, 1, None, MODEL),
    "ZeRO 3, more ranks than experts": (3, 1, None, FEW_EXPERTS),
    "ZeRO 4": (4, 1, None, MODEL),
    "EP 2 x ZeRO 2": (4, 2, None, MODEL),
    "EP 4": (4, 4, None, MODEL),
    "2 replicas of EP 2": (4, 2, 2, MODEL),
    "ZeRO 4, more ranks than experts": (4, 1, None, FEW_EXPERTS),
    "EP 2 x ZeRO 2, one expert each": (4, 2, None, FEW_EXPERTS),
}


def sharded(layouts: list[tuple[int, int | None, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    """Initialises models spread over all ranks; returns their weights, whole."""
    from aria_train.parallel.mesh import build_meshes
    from aria_train.parallel.shard import parallelize

    results = []
    for expert, group, model in layouts:
        meshes = build_meshes(ParallelConfig(expert_parallel_size=expert, zero_group_size=group), torch.device("cpu"))
        with torch.device("meta"):
            spread = AriaModel(ModelConfig.model_validate(model))
        parallelize(spread, meshes, "fp32")
        spread.to_empty(device="cpu")
        initialise(spread, 0.15, SEED)
        results.append({name: _whole(p) for name, p in spread.named_parameters()})
    return results


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def whole(model: dict[str, Any], seed: int = SEED) -> dict[str, Tensor]:
    plain = AriaModel(ModelConfig.model_validate(model))
    initialise(plain, 0.15, seed)
    return {name: p.detach() for name, p in plain.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_layout_draws_the_same_weights(ranks: int) -> None:
    names = [name for name, layout in LAYOUTS.items() if layout[0] == ranks]
    per_rank = run_distributed(sharded, ranks, [LAYOUTS[name][1:] for name in names])
    for rank in per_rank:
        for name, found in zip(names, rank, strict=True):
            wanted = whole(LAYOUTS[name][3])
            assert found.keys() == wanted.keys()
            assert [parameter for parameter in wanted if not torch.equal(found[parameter], wanted[parameter])] == []


def test_matrices_are_normal_gains_one() -> None:
    for name, weight in whole({**MODEL, "hidden_size": 64}).items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.15, rel=0.1), name
            assert abs(weight.mean().item()) < 4 * 0.15 / weight.numel() ** 0.5, name
            assert 2.2 < (weight.abs().max() / 0.15).item() < 6, name


def test_no_two_matrices_or_experts_are_alike() -> None:
    weights = whole(MODEL)
    slabs = [s for w in weights.values() if w.ndim > 1 for s in (w if w.ndim == 3 else w[None])]
    firsts = [tuple(slab.flatten()[:8].tolist()) for slab in slabs]
    assert len(set(firsts)) == len(firsts)


def test_the_seed_decides() -> None:
    first, again, other = whole(MODEL), whole(MODEL), whole(MODEL, seed=SEED + 1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert weight.ndim == 1 or not torch.equal(weight, other[name])


def test_biases_are_zero() -> None:
    layer = torch.nn.Linear(3, 2)
    initialise(layer, 0.02, 0)
    assert not layer.bias.any()
    assert layer.weight.all()
