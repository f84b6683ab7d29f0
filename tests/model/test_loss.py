"""Head and cross-entropy in chunks against full logits; what is never held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aria_train.model import loss as loss_module
from aria_train.model.loss import linear_cross_entropy

POSITIONS, HIDDEN, VOCABULARY = 37, 16, 50


def inputs(dtype: torch.dtype, positions: int = POSITIONS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(VOCABULARY, (positions,), generator=generator)


@pytest.mark.parametrize("columns", [1, 7, 25, 49, 50, 1000])
@pytest.mark.parametrize("rows", [1, 7, 36, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_equal_full_logits(rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_TILE_CPU", (rows, columns))
    x, weight, labels = inputs(dtype)
    total, each = linear_cross_entropy(x, weight, labels)
    # A mean, so that the gradient arrives scaled, as it does in training.
    gradients = torch.autograd.grad(total / 29, (x, weight))

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    wanted = F.cross_entropy(x64 @ weight64.T, labels, reduction="none")
    wanted_gradients = torch.autograd.grad(wanted.sum() / 29, (x64, weight64))
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert total.dtype == each.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.sum().item(), rel=tolerance)
    assert (each - wanted).abs().max() < tolerance * wanted.abs().max()
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert not each.requires_grad


def test_many_chunks_in_bf16_lose_nothing_to_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient adds up in float32: a chunk per position is as exact as one chunk for all."""
    deviations = []
    x, weight, labels = inputs(torch.bfloat16, positions=300)
    (exact,) = torch.autograd.grad(
        F.cross_entropy(x.detach().double() @ (w := weight.detach().double().requires_grad_()).T, labels), w
    )
    for rows in (1, 300):
        monkeypatch.setattr(loss_module, "_TILE_LOGITS", rows * VOCABULARY)
        (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels)[0] / 300, weight)
        deviations.append((found - exact).abs().max() / exact.abs().max())
    assert max(deviations) < 1e-2


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_a_window_are_never_held(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, positions = 4, 200
    monkeypatch.setattr(loss_module, "_TILE_LOGITS", rows * VOCABULARY)
    x, weight, labels = inputs(dtype, positions)
    with LargestTensor() as seen:
        total, _ = linear_cross_entropy(x, weight, labels)
        total.backward()
    # Hidden states, their gradient, the weight's gradient and a chunk's logits; 200 x 50 logits would be 10,000.
    assert seen.numel == max(positions * HIDDEN, VOCABULARY * HIDDEN, rows * VOCABULARY)
    with LargestTensor() as seen:
        F.cross_entropy((x @ weight.T).float(), labels)
    assert seen.numel == positions * VOCABULARY


def test_the_default_tile_is_small_beside_a_window() -> None:
    """At 64K positions and 100,352 tokens the logits would be 25 GiB in float32; a tile is 128 MiB."""
    assert loss_module._TILE_LOGITS * 4 <= 2**27


def test_without_gradients_none_are_worked_out() -> None:
    x, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        total, each = linear_cross_entropy(x, weight, labels)
    assert not total.requires_grad
    assert total.item() == pytest.approx(each.double().sum().item())


def test_no_targets() -> None:
    x, weight, _ = inputs(torch.float32)
    total, each = linear_cross_entropy(x[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert total.item() == 0
    assert each.shape == (0,)
    for gradient in torch.autograd.grad(total, (x, weight), allow_unused=True):
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("columns", [7, 50])
def test_large_logits_are_finite(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a label's whole tile is beyond what float32 tells from 0."""
    monkeypatch.setattr(loss_module, "_TILE_CPU", (10, columns))
    x, weight, labels = inputs(torch.float32)
    total, _ = linear_cross_entropy(x * 1000, weight, labels)
    wanted = F.cross_entropy((x * 1000) @ weight.T, labels, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for found, expected in zip(
        torch.autograd.grad(total, (x, weight)), torch.autograd.grad(wanted, (x, weight)), strict=True
    ):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("columns", [7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_prediction_leaves_a_small_gradient(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probability of almost 1 less 1 is not lost to rounding."""
    monkeypatch.setattr(loss_module, "_TILE_CPU", (10, columns))
    weight = torch.eye(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    labels = torch.arange(HIDDEN)
    x = (14 * torch.eye(HIDDEN)).to(dtype).requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(x, weight, labels)[0], x)[0].diagonal()
    x64 = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(x64 @ weight.detach().double().T, labels, reduction="sum"), x64)[0]
    assert (found / wanted.diagonal() - 1).abs().max() < (1e-2 if dtype == torch.bfloat16 else 2e-2)


def test_a_sum_of_many_losses_keeps_its_digits() -> None:
    weight = torch.zeros(VOCABULARY, HIDDEN)
    x = torch.zeros(100_000, HIDDEN)
    total, _ = linear_cross_entropy(x, weight, torch.zeros(100_000, dtype=torch.int64))
    assert total.item() == pytest.approx(100_000 * torch.tensor(50.0).log().item(), rel=1e-7)
