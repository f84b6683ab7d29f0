"""How parameters are laid out, also where ranks and experts do not divide evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from aria_train.config import RunConfig
from aria_train.moe.experts import local
from aria_train.parallel.shard import expert_shard
from tests.distributed import run_distributed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values


def train(config: RunConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Trains; returns the shape of this rank's part of every expert tensor."""
    from aria_train.train.trainer import Trainer

    trainer = Trainer(config)
    trainer.run()
    parameters = trainer.state.model.named_parameters()
    return [(name, tuple(local(p).shape)) for name, p in parameters if ".experts." in name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two experts, so that four ranks have more ranks than experts."""
    folder = tmp_path_factory.mktemp("shard")
    config = tiny_config(folder / "alone", unequal_corpora(folder / "corpora"))
    return with_values(config, model={"num_experts": 2, "num_layers": 1}, train={"max_steps": 3})


@pytest.fixture(scope="module")
def alone(base: RunConfig) -> list[dict[str, Any]]:
    run_distributed(train, 1, base)
    return read_steps(base.train.run_dir)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "expert", "shapes"),
    [
        # Hidden size 32, experts of 16: rows of both experts on every rank.
        (4, 1, [{(2, 8, 32)}, {(2, 4, 32)}]),
        (4, 2, [{(1, 16, 32)}, {(1, 8, 32)}]),
        (2, 1, [{(1, 32, 32)}, {(1, 16, 32)}]),
        # Three ranks divide neither experts nor rows: one of them has nothing.
        (3, 1, [{(1, 32, 32), (0, 32, 32)}, {(1, 16, 32), (0, 16, 32)}]),
    ],
)
def test_more_ranks_than_experts(
    ranks: int, expert: int, shapes: list[set[tuple[int, ...]]], base: RunConfig, alone: Any, tmp_path: Path
) -> None:
    config = with_values(base, parallel={"expert_parallel_size": expert}, train={"run_dir": str(tmp_path)})
    per_rank = run_distributed(train, ranks, config)
    for index, wanted in enumerate(shapes):
        assert {rank[index][1] for rank in per_rank} == wanted
    for line, other in zip(read_steps(tmp_path), alone, strict=True):
        for metric in ("loss", "grad_norm", "balance_loss"):
            assert line[metric] == pytest.approx(other[metric], rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"), [((8, 30, 10), 4, 0), ((2, 32, 10), 4, 1), ((2, 30, 10), 4, 0), ((8, 32, 10), 1, 0)]
)
def test_whole_experts_while_there_are_enough(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    assert expert_shard(nn.Parameter(torch.empty(shape)), ranks) == Shard(dim)
