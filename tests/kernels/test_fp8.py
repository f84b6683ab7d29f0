"""Experts in FP8. PyTorch's kernel, which runs on a GPU alone, is replaced by products of what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from aria_train.config import load_config
from aria_train.errors import ConfigError
from aria_train.kernels import fp8
from aria_train.kernels.compiled import compile_chains
from aria_train.model import AriaModel
from aria_train.moe.experts import GroupedExperts, grouped_mm, use_fp8
from tests.model.test_decoder import DOCUMENTS, model_config, pack

ENDS = torch.tensor([5, 5, 16, 19], dtype=torch.int32)
"""Of four experts, the second without rows."""
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "small" / "stage1_lang.yaml"
SHAPE = {"num_experts": 4, "hidden_size": 32, "expert_size": 16}


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel, in float32 and of operands laid out as it demands; how many rows each call had."""
    seen: list[int] = []

    def kernel(
        rows: Tensor, columns: Tensor, row_scales: Tensor, row_recipe: Any, column_scales: Tensor, column_recipe: Any,
        *, offs: Tensor, output_dtype: torch.dtype, use_fast_accum: bool,
    ) -> Tensor:  # fmt: skip
        assert row_recipe is column_recipe is ScalingType.RowWise
        assert rows.dtype == columns.dtype == torch.float8_e4m3fn
        assert rows.stride(-1) == columns.stride(-2) == 1  # row-major, column-major
        assert row_scales.is_contiguous()
        assert column_scales.is_contiguous()
        assert (rows.shape[:1], columns[:, 0].shape) == (row_scales.shape, column_scales.shape)
        # What PyTorch's own shape function checks besides: strides, alignment, kinds of scales.
        meta = [x.to("meta") for x in (rows, row_scales, column_scales)]
        torch._scaled_grouped_mm(meta[0], columns.mT.to("meta").mT, *meta[1:], offs=offs.to("meta"))
        seen.append(len(rows))
        weights = columns.float() * column_scales[:, None]
        return by_expert(rows.float() * row_scales[:, None], weights, offs).to(output_dtype)

    monkeypatch.setattr(F, "scaled_grouped_mm", kernel)
    return seen


def by_expert(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    parts = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_values_times_scales_are_the_rows_to_three_bits() -> None:
    x = torch.randn(64, 48).bfloat16() * torch.logspace(-20, 20, 64, dtype=torch.bfloat16)[:, None]
    values, scales = fp8.quantise(x)
    assert torch.equal(scales.log2(), scales.log2().round())
    assert values.float().abs().amax(-1).min() >= 448 / 2  # nothing of the range is given away but a power of two
    wanted = x.double()
    error = (values.double() * scales.double()[:, None] - wanted).abs()
    largest = wanted.abs().amax(-1, keepdim=True)
    assert (error <= (wanted.abs() / 16).maximum(largest * 2.0**-17)).all()


@pytest.mark.parametrize("largest", [447.9, 448.0, 449.0, 3e38])
def test_the_largest_value_of_a_row_is_never_too_large(largest: float) -> None:
    values, scales = fp8.quantise(torch.tensor([[largest, 1.0]]))
    assert (values.float() * scales)[0, 0].item() == pytest.approx(largest, rel=1 / 16)


def test_rows_of_zeros_and_no_rows() -> None:
    values, scales = fp8.quantise(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert not values.float().any()
    assert scales.isfinite().all()
    assert fp8.quantise(torch.zeros(0, 16))[0].shape == (0, 16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float, calls: list[int]) -> None:
    rows, weight = torch.randn(19, 32).bfloat16(), torch.randn(4, 32, 16).bfloat16()
    rows[3, 7] = value
    out = fp8.grouped_mm(rows, weight, ENDS)
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:].isfinite().all()


def test_products_and_gradients_are_those_of_float64_but_for_rounding(calls: list[int]) -> None:
    rows, weight = torch.randn(19, 32).bfloat16(), torch.randn(4, 32, 16).bfloat16()
    way = torch.randn(19, 16).bfloat16()
    found = [x.clone().requires_grad_() for x in (rows, weight)]
    wanted = [x.double().requires_grad_() for x in (rows, weight)]
    out, exact = fp8.grouped_mm(*found, ENDS), by_expert(*wanted, ENDS)
    out.backward(way)
    exact.backward(way.double())
    assert (out.dtype, found[0].grad.dtype, found[1].grad.dtype) == (torch.bfloat16,) * 3
    # Two operands, each off by up to 1/16 and by about 1/40 in the mean.
    assert relative(out, exact) < 0.05
    assert relative(found[0].grad, wanted[0].grad) < 0.05
    assert relative(found[1].grad, wanted[1].grad) < 0.004  # bf16
    assert calls == [19, 19]


def test_a_frozen_weight_gets_no_gradient(calls: list[int]) -> None:
    rows, weight = torch.randn(19, 32).bfloat16().requires_grad_(), torch.randn(4, 32, 16).bfloat16()
    fp8.grouped_mm(rows, weight, ENDS).sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("in_fp8", [False, True])
def test_no_rows_and_zero_gradients(in_fp8: bool) -> None:
    """A rank whose experts nobody chose: no kernel is called, and there is a gradient to reduce."""
    rows, weight = torch.zeros(0, 32).bfloat16().requires_grad_(), torch.randn(4, 32, 16).bfloat16().requires_grad_()
    out = grouped_mm(rows, weight, torch.zeros(4, dtype=torch.int32), in_fp8)
    out.sum().backward()
    assert out.shape == (0, 16)
    assert rows.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_strided_rows(calls: list[int]) -> None:
    """As half of what gate and up make together."""
    both, weight = torch.randn(19, 64).bfloat16(), torch.randn(4, 32, 16).bfloat16()
    half = both.chunk(2, dim=-1)[1]
    assert torch.equal(fp8.grouped_mm(half, weight, ENDS), fp8.grouped_mm(half.contiguous(), weight, ENDS))


def test_the_whole_model_goes_down_the_same_way(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with bf16: loss and the direction of every gradient; the same to the bit with recomputation, where
    nothing is quantised twice."""
    monkeypatch.setattr(GroupedExperts, "mixes", False)
    monkeypatch.setattr(GroupedExperts, "forward", GroupedExperts.compose)
    model = AriaModel(model_config(**SHAPE)).bfloat16()

    def step() -> list[Tensor]:
        model.zero_grad()
        output = model(pack(DOCUMENTS))
        output.loss_sum.backward()
        return [output.loss_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = step()
    use_fp8(model, torch.device("cpu"))
    calls.clear()
    found = step()
    assert len(calls) == 4 * model.config.num_layers
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-2)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert F.cosine_similarity(a.float().flatten(), b.float().flatten(), 0) > 0.97
    calls.clear()
    model.set_recompute("selective")
    for a, b in zip(step(), found, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 4 * model.config.num_layers


def test_compiled(calls: list[int]) -> None:
    rows, weight = torch.randn(19, 32).bfloat16(), torch.randn(4, 32, 16).bfloat16()
    wanted = fp8.grouped_mm(rows, weight, ENDS)
    compile_chains(True)
    try:
        assert torch.equal(fp8.grouped_mm(rows, weight, ENDS), wanted)
    finally:
        compile_chains(False)


def test_without_such_a_gpu_one_error() -> None:
    with pytest.raises(ConfigError, match=r"fp8_experts is true, but .* CPU.*H100, H200.*fp8_experts=false"):
        use_fp8(AriaModel(model_config(**SHAPE)), torch.device("cpu"))


def test_what_it_needs_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="train.fp8_experts needs train.precision bf16"):
        load_config(CONFIG, ["train.fp8_experts=true", "train.precision=fp32"])
    with pytest.raises(ConfigError, match="expert_size 24 must be a multiple of 16 with train.fp8_experts"):
        load_config(CONFIG, ["train.fp8_experts=true", "train.precision=bf16", "model.expert_size=24"])
