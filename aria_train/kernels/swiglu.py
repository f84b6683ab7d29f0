"""SwiGLU (arXiv 2002.05202): alone, and with the GEMMs around it for experts whose rows lie together.

Shape legend: S rows, H hidden, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.kernels import blocks

_silu_into = torch.ops.aten.silu.out
_silu_backward_into = torch.ops.aten.silu_backward.grad_input


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, [S, F] each; keeps these two alone for the backward pass."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_SF: Tensor, up_SF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_SF, up_SF)
        out_SF = torch.empty_like(gate_SF)
        for rows in blocks(out_SF):
            _silu_into(gate_SF[rows], out=out_SF[rows]).mul_(up_SF[rows])
        return out_SF

    @staticmethod
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor, Tensor]:
        gate_SF, up_SF = ctx.saved_tensors
        grad_gate_SF, grad_up_SF = torch.empty_like(gate_SF), torch.empty_like(up_SF)
        for rows in blocks(gate_SF):
            gate, grad = gate_SF[rows], grad_SF[rows]
            _silu_into(gate, out=grad_up_SF[rows]).mul_(grad)
            _silu_backward_into(grad * up_SF[rows], gate, grad_input=grad_gate_SF[rows])
        return grad_gate_SF, grad_up_SF


def grouped_swiglu(rows_SH: Tensor, gate_up_EHF: Tensor, down_EFH: Tensor, offsets_E: Tensor) -> Tensor:
    """Experts over rows sorted by expert: `(silu(x @ gate) * (x @ up)) @ down` -> [S, H].

    gate_up [E, H, 2F], its first half the gate; down [E, F, H]; offsets int32 [E], the end of each expert's rows.
    Keeps the rows, and what gate and up made of them, for the backward pass.
    """
    if rows_SH.dtype == torch.float32:
        return _GroupedSwiGLU.apply(rows_SH, None, gate_up_EHF, down_EFH, offsets_E)
    # Below float32 oneDNN prepares a kernel for every number of rows it has not seen lately, which takes longer than
    # the product itself. So every expert gets a multiple of 32 rows, and there are few such numbers.
    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    padded_E = (counts_E + 31) // 32 * 32
    ends_E = padded_E.cumsum(0, dtype=torch.int32)
    shifts_E = (ends_E - padded_E) - (offsets_E - counts_E)
    places_S = torch.arange(rows_SH.shape[0]) + shifts_E.repeat_interleave(counts_E, output_size=rows_SH.shape[0])
    return _GroupedSwiGLU.apply(rows_SH, places_S, gate_up_EHF, down_EFH, ends_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """With `places` [S] int64 the rows are spread out to these rows of a larger tensor, whose others are zero."""

    @staticmethod
    def forward(
        ctx: Any, rows_SH: Tensor, places_S: Tensor | None, gate_up_EHF: Tensor, down_EFH: Tensor, ends_E: Tensor
    ) -> Tensor:
        rows = _spread(rows_SH, places_S, ends_E)
        hidden = F.grouped_mm(rows, gate_up_EHF, offs=ends_E)
        gate, up = hidden.chunk(2, dim=-1)
        product = gate.new_empty(gate.shape)
        for part in blocks(product):
            _silu_into(gate[part], out=product[part]).mul_(up[part])
        ctx.save_for_backward(rows, places_S, hidden, gate_up_EHF, down_EFH, ends_E)
        return _gather(F.grouped_mm(product, down_EFH, offs=ends_E), places_S)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor | None, ...]:
        rows, places_S, hidden, gate_up_EHF, down_EFH, ends_E = ctx.saved_tensors
        need_rows, _, need_gate_up, need_down, _ = ctx.needs_input_grad
        grad = _spread(grad_SH.contiguous(), places_S, ends_E)
        gate, up = hidden.chunk(2, dim=-1)
        grad_product = F.grouped_mm(grad, down_EFH.transpose(1, 2), offs=ends_E)
        product, grad_hidden = torch.empty_like(grad_product), torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        for part in blocks(product):
            _silu_into(gate[part], out=product[part])
            torch.mul(grad_product[part], product[part], out=grad_up[part])
            product[part].mul_(up[part])
            _silu_backward_into(grad_product[part].mul_(up[part]), gate[part], grad_input=grad_gate[part])
        grad_down = F.grouped_mm(product.t(), grad, offs=ends_E) if need_down else None
        grad_gate_up = F.grouped_mm(rows.t(), grad_hidden, offs=ends_E) if need_gate_up else None
        grad_rows = None
        if need_rows:
            grad_rows = _gather(F.grouped_mm(grad_hidden, gate_up_EHF.transpose(1, 2), offs=ends_E), places_S)
        return grad_rows, None, grad_gate_up, grad_down, None


def _spread(rows_SH: Tensor, places_S: Tensor | None, ends_E: Tensor) -> Tensor:
    if places_S is None:
        return rows_SH
    return rows_SH.new_zeros(int(ends_E[-1]), rows_SH.shape[1]).index_copy_(0, places_S, rows_SH)


def _gather(rows: Tensor, places_S: Tensor | None) -> Tensor:
    return rows if places_S is None else rows.index_select(0, places_S)
