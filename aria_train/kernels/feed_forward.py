"""Second halves of feed-forward networks: activation and product in one, so that what lies between is not kept.

It is as wide as the network, and cheap to make again in the backward pass.

Shape legend: S rows, F width of the network, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.kernels import blocks

_silu_into = torch.ops.aten.silu.out
_silu_backward_into = torch.ops.aten.silu_backward.grad_input
_gelu_backward_into = torch.ops.aten.gelu_backward.grad_input


def swiglu_linear(gate_SF: Tensor, up_SF: Tensor, weight_OF: Tensor) -> Tensor:
    """`(silu(gate) * up) @ weight.T` -> [S, O] (arXiv 2002.05202); keeps gate and up alone."""
    return _SwiGLULinear.apply(gate_SF, up_SF, weight_OF)


def gelu_linear(x_SF: Tensor, weight_OF: Tensor, bias_O: Tensor) -> Tensor:
    """`gelu(x) @ weight.T + bias` -> [S, O], gelu in its tanh form; keeps x alone."""
    return _GELULinear.apply(x_SF, weight_OF, bias_O)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_SF: Tensor, up_SF: Tensor, weight_OF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_SF, up_SF, weight_OF)
        return F.linear(_swiglu(gate_SF, up_SF), weight_OF)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate_SF, up_SF, weight_OF = ctx.saved_tensors
        grad_weight_OF = grad_SO.T @ _swiglu(gate_SF, up_SF) if ctx.needs_input_grad[2] else None
        grad_SF = grad_SO @ weight_OF
        grad_up_SF = torch.empty_like(up_SF)
        for rows in blocks(gate_SF):
            gate, grad = gate_SF[rows], grad_SF[rows]
            _silu_into(gate, out=grad_up_SF[rows]).mul_(grad)
            _silu_backward_into(grad * up_SF[rows], gate, grad_input=grad)
        return grad_SF, grad_up_SF, grad_weight_OF


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SF: Tensor, weight_OF: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(x_SF, weight_OF)
        return F.linear(F.gelu(x_SF, approximate="tanh"), weight_OF, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_SF, weight_OF = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad
        grad_weight_OF = grad_SO.T @ F.gelu(x_SF, approximate="tanh") if need_weight else None
        grad_SF = grad_SO @ weight_OF
        _gelu_backward_into(grad_SF, x_SF, approximate="tanh", grad_input=grad_SF)
        return grad_SF, grad_weight_OF, grad_SO.sum(0) if need_bias else None


def _swiglu(gate_SF: Tensor, up_SF: Tensor) -> Tensor:
    out_SF = torch.empty_like(gate_SF)
    for rows in blocks(out_SF):
        _silu_into(gate_SF[rows], out=out_SF[rows]).mul_(up_SF[rows])
    return out_SF
