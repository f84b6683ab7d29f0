"""Experts' grouped products in FP8, for GPUs that multiply it (compute capability 9.0: H100, H200).

Operands are E4M3, each row of tokens and each column of weights with a scale of its own: a power of two, so scaling
loses nothing and the one rounding is that to three bits of mantissa (at most 1/16 of a value). Outputs and gradients of
rows are such products. Gradients of weights stay products in bf16: they sum over rows, where the kernel would want
every expert's rows padded to a multiple of 16, and the rounding errors of many micro-batches would add up.

Compared with the dequantised products in float32 on a CPU, with PyTorch's kernel replaced; not yet seen on a GPU.

Shape legend: S rows sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.errors import ConfigError
from aria_train.kernels.compiled import chain

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_PEAK = 1e-30
"""A row of zeros is scaled as if this were its largest value."""
_MANTISSA, _EXPONENT = 0x007FFFFF, -0x00800000
"""Bits of a float32: its fraction; its sign and exponent."""


def require(device: torch.device) -> None:
    """Raises ConfigError where the device multiplies no FP8."""
    ones, scales = torch.ones(1, 16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(1, 16, device=device)
    ends = torch.full((1,), 16, dtype=torch.int32, device=device)
    try:
        _multiply(ones[0], scales[0], ones, scales, ends, torch.bfloat16)
    except (RuntimeError, ValueError, AttributeError) as error:  # no kernel, or no function
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        raise ConfigError(
            f"train.fp8_experts is true, but PyTorch has no grouped products in FP8 for {name}: {reason}. They need a "
            "GPU of compute capability 9.0 (H100, H200). Use one, or set train.fp8_experts=false: bf16, as all else."
        ) from error


@chain
def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of [..., I], I its last dimension, as `values * scale`: values E4M3 [..., I], contiguous; scales float32
    [...], powers of two. What is not finite makes all products with its row NaN."""
    peak = x.abs().amax(-1).float().clamp(min=_SMALLEST_PEAK)
    scale = (((peak / _LARGEST).view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)  # rounded up
    return (x * scale.reciprocal().to(x.dtype).unsqueeze(-1)).to(torch.float8_e4m3fn).contiguous(), scale


@torch.library.custom_op("aria_train::fp8_grouped_mm", mutates_args=())
def grouped_mm(rows_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows times their expert's matrix, differentiable: bf16 [S, I] and [E, I, O] -> bf16 [S, O].

    ends: int32 [E], the end of each expert's rows. S is not 0; I and O are multiples of 16. One operator, so that
    selective recomputation keeps what comes out and quantises nothing again.
    """
    rows, row_scales_S = quantise(rows_SI)
    columns_EOI, column_scales_EO = quantise(weight_EIO.mT)
    return _multiply(rows, row_scales_S, columns_EOI, column_scales_EO, ends_E, rows_SI.dtype)


def _multiply(
    rows_SI: Tensor,
    row_scales_S: Tensor,
    columns_EOI: Tensor,
    column_scales_EO: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    by_row = F.ScalingType.RowWise
    return F.scaled_grouped_mm(  # type: ignore[attr-defined, no-any-return, unused-ignore]
        rows_SI, columns_EOI.mT, row_scales_S, by_row, column_scales_EO, by_row,
        offs=ends_E, output_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip


@grouped_mm.register_fake
def _(rows_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return rows_SI.new_empty(rows_SI.shape[0], weight_EIO.shape[2])


def _backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_SI, weight_EIO, ends_E = ctx.saved_tensors
    need_rows, need_weight, _ = ctx.needs_input_grad
    grad_SO = grad_SO.contiguous()
    grad_rows = grouped_mm(grad_SO, weight_EIO.mT, ends_E) if need_rows else None
    grad_weight = F.grouped_mm(rows_SI.mT, grad_SO, offs=ends_E) if need_weight else None
    return grad_rows, grad_weight, None


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


grouped_mm.register_autograd(_backward, setup_context=_keep)
