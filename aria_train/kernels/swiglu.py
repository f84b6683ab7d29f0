"""SwiGLU (arXiv 2002.05202). Shape legend: S rows, F width."""

from __future__ import annotations

from typing import Any

import torch
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
