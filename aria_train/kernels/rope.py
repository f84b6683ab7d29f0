"""Rotary position embedding in place of its eight passes over memory. Shape legend: T tokens, N heads, D head width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aria_train.kernels import blocks


def rotate(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head by its token's angles, [T, D / 2]; element i pairs with element i + D / 2."""
    return _Rotate.apply(x_TND, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_TND, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_TND, cos, -sin), None, None


def _rotated(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out_TND = torch.empty(x_TND.shape, dtype=x_TND.dtype)
    cos, sin = cos.to(x_TND.dtype).unsqueeze(1), sin.to(x_TND.dtype).unsqueeze(1)
    for rows in blocks(x_TND):
        first, second = x_TND[rows].chunk(2, dim=-1)
        out_first, out_second = out_TND[rows].chunk(2, dim=-1)
        torch.mul(first, cos[rows], out=out_first).addcmul_(second, sin[rows], value=-1)
        torch.mul(second, cos[rows], out=out_second).addcmul_(first, sin[rows])
    return out_TND
