"""Learning-rate schedules, parameter groups, and clipping."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aria_train.config import ModelConfig, OptimizerConfig, RunConfig
from aria_train.model import AriaModel
from aria_train.train.optimizer import build_optimizer, clip_gradients, learning_rate
from tests.distributed import run_distributed
from tests.tiny import MODEL, tiny_config

STEP = 10


def scheduled(**schedule: Any) -> RunConfig:
    """10 tokens per step, 100 steps, peak 1."""
    return tiny_config(
        Path("unused"),
        [],
        optimizer={"lr": 1.0},
        schedule={"warmup_tokens": 0, "total_tokens": None, **schedule},
        train={"context_length": 5, "global_batch_size": 2, "max_steps": 100, "precision": "fp32"},
    )


def rates(config: RunConfig, steps: int = 100) -> list[float]:
    return [learning_rate(config, step * STEP) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(kind: str) -> None:
    found = rates(scheduled(kind=kind, warmup_tokens=100, decay_tokens=200))
    assert found[:10] == pytest.approx([n / 10 for n in range(1, 11)])


def test_cosine_ends_at_its_floor() -> None:
    found = rates(scheduled(kind="cosine", warmup_tokens=100, min_lr_ratio=0.1), 120)
    assert found[9] == pytest.approx(1.0)
    assert found[54] == pytest.approx((1 + 0.1) / 2)
    assert found[31] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 220 / 900)) / 2)
    assert found[99:] == pytest.approx([0.1] * 21)
    assert all(a > b for a, b in itertools.pairwise(found[9:100]))


def test_constant_stays() -> None:
    assert rates(scheduled(kind="constant", warmup_tokens=20))[2:] == [1.0] * 98


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    found = rates(scheduled(kind="wsd", warmup_tokens=50, decay_tokens=200, min_lr_ratio=0.2))
    assert found[5:80] == [1.0] * 75
    assert found[80:] == pytest.approx([1 - 0.8 * n / 20 for n in range(1, 21)])


def test_the_schedule_may_be_longer_than_the_run() -> None:
    assert rates(scheduled(kind="cosine", total_tokens=2000, min_lr_ratio=0.0))[-1] == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    model = AriaModel(ModelConfig.model_validate(MODEL))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[parameter] == (0.0 if name.endswith("norm.weight") else 0.3), name


def clip_all(max_norms: list[float]) -> list[tuple[float, list[list[float]]]]:
    results = []
    for max_norm in max_norms:
        gradients = [[3.0, 0.0], [0.0, 4.0], []]
        parameters = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        norm = clip_gradients([*parameters, nn.Parameter(torch.zeros(2))], max_norm, 1)
        results.append((norm.item(), [p.grad.tolist() for p in parameters if p.grad is not None]))
    return results


@pytest.mark.distributed
def test_clipping_scales_to_the_limit_and_not_below() -> None:
    limited, loose, unlimited = run_distributed(clip_all, 1, [0.5, 7.0, 0.0])[0]
    assert limited[0] == loose[0] == unlimited[0] == 5.0
    assert limited[1] == [pytest.approx([0.3, 0]), pytest.approx([0, 0.4]), []]
    assert loose[1] == unlimited[1] == [[3.0, 0.0], [0.0, 4.0], []]
