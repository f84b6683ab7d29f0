"""The trainer's own step at 1024 ranks, of which this process is one and nobody the others, on tensors without data:
what a rank holds, and what it sends, is what `aria-train plan` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from aria_train.config import GuardConfig, RunConfig
from aria_train.model import AriaModel
from aria_train.parallel.mesh import build_meshes
from aria_train.plan.communication import communication
from aria_train.plan.layout import Layout, parameters_of
from aria_train.plan.memory import memory
from aria_train.plan.trace import Activations, Meter, make_batch
from aria_train.train.guard import Guard, GuardState
from aria_train.train.pulse import Pulse
from aria_train.train.trainer import Trainer
from tests.parallel.test_communication import Collectives

WORLD, LENGTH = 1024, 2048


@contextmanager
def world(rank: int) -> Iterator[None]:
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def config_of(expert: int, group: int | None, recompute: str) -> RunConfig:
    """Aria at full width, three layers of it; two micro-batches of one window per rank and step."""
    return RunConfig.model_validate(
        {
            "stage": "large",
            "model": {"num_layers": 3},
            "parallel": {"expert_parallel_size": expert, "zero_group_size": group},
            "data": {"train": [{"name": "a", "path": "nowhere"}]},
            "train": {
                "context_length": LENGTH,
                "global_batch_size": 2 * WORLD,
                "max_steps": 1,
                "recompute": recompute,
                "device": "cpu",
            },
        }
    )


def step(config: RunConfig, rank: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """One step of the trainer. Returns bytes held by part, calls and bytes sent by collective."""
    with world(rank):
        trainer = Trainer.__new__(Trainer)
        trainer.config, trainer.device = config, torch.device("cpu")
        trainer.meshes = build_meshes(config.parallel, trainer.device)
        trainer.loader = SimpleNamespace(sources=[], epochs=lambda step: {})  # type: ignore[assignment]
        trainer.console = SimpleNamespace(message=lambda text: None)  # type: ignore[assignment]
        trainer.watchdog = SimpleNamespace(beat=lambda step, doing: None)  # type: ignore[assignment]
        trainer.guard = Guard(GuardConfig(), GuardState())
        without_data = FakeTensorMode(allow_non_fake_inputs=True)
        to_empty = AriaModel.to_empty

        def without_storage(model: AriaModel, device: torch.device) -> AriaModel:
            with without_data:
                return to_empty(model, device=device)

        with mock.patch.object(AriaModel, "to_empty", without_storage):
            trainer.state = trainer._build_state()
        with without_data:
            trainer.pulse = Pulse(trainer.meshes, 0)
            batch, known = make_batch(config.model, 1, LENGTH, 0)
            rows = LENGTH * config.model.top_k // config.parallel.expert_parallel_size
            with Collectives() as sent, Meter(config.model.num_experts, rows, known):
                trainer._step([batch, batch])
        state = trainer.state.optimizer.state.values()
        held = {
            "master_weights": sum(local_bytes(p) for p in trainer.state.model.parameters()),
            "optimizer": sum(local_bytes(s[key]) for s in state for key in ("exp_avg", "exp_avg_sq")),
        }
        return held, dict(sent.calls), dict(sent.bytes)


def local_bytes(tensor: Any) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(tensor.numel() * tensor.element_size())


@pytest.mark.parametrize(
    ("expert", "group", "recompute", "rank"),
    # Where not all ranks of a group hold equally much, its first holds most.
    [(8, 64, "selective", 517), (64, None, "full", 0), (16, 128, "none", 896)],
)
def test_a_step_at_1024_ranks_is_as_planned(expert: int, group: int | None, recompute: str, rank: int) -> None:
    config = config_of(expert, group, recompute)
    layout, parameters = Layout.of(config, WORLD), parameters_of(config.model)
    held, calls, given = step(config, rank)
    plan = memory(config, parameters, layout, Activations(0, 0, 0))
    assert held["master_weights"] == plan.master_weights
    assert held["optimizer"] == plan.optimizer
    collectives = communication(config, parameters, layout)
    names = {
        "_allgather_base_": ("all-gather", ""),
        "_reduce_scatter_base_": ("reduce-scatter", ""),
        "allreduce_": ("all-reduce", ""),
        "tokens": ("all-to-all", "tokens"),
        "token counts": ("all-to-all", "token counts"),
    }
    for name, (kind, what) in names.items():
        expected = [c for c in collectives if c.kind == kind and what in ("", c.what)]
        assert calls.get(name, 0) == sum(c.calls for c in expected), name
        assert given.get(name, 0) == sum(c.given for c in expected), name
