"""Routing of tokens to experts and back, as gathers that sum on the way.

On any device: as batched products, one per token, the sums would hold the gathered rows, and a window of 64K would be
more products than a CUDA grid has blocks in its second dimension (65,535).

Shape legend: T tokens, H hidden, E experts, K experts per token, R = T * K rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.kernels import compiled
from aria_train.kernels.compiled import chain


def stable_argsort(values: Tensor, bound: int) -> Tensor:
    """The stable order of small integers, on a CPU: int64 in [0, bound); by radix where 16 bits hold them, as NumPy."""
    if bound > 1 << 16:
        return values.argsort(stable=True)
    narrow = values.numpy().astype(np.uint8 if bound <= 1 << 8 else np.uint16)
    return torch.from_numpy(narrow.argsort(kind="stable"))


def sum_rows(rows_RH: Tensor, home_TK: Tensor) -> Tensor:
    """The sum of each token's rows -> [T, H]. No gradient."""
    if compiled.enabled():
        return _sum(rows_RH, home_TK)
    return F.embedding_bag(home_TK, rows_RH, mode="sum")


def weighted_sum(rows_RH: Tensor, home_TK: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows -> [T, H].

    home [T, K]: the rows of each token; order [R], its inverse: the (token, choice) pair of each row.
    """
    return _WeightedSum.apply(rows_RH, home_TK, order_R, weights_TK)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, home_TK: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RH, home_TK, order_R, weights_TK)
        if compiled.enabled():
            return _sum(rows_RH, home_TK, weights_TK)
        return F.embedding_bag(home_TK, rows_RH, mode="sum", per_sample_weights=weights_TK.to(rows_RH.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows_RH, home_TK, order_R, weights_TK = ctx.saved_tensors
        if compiled.enabled():
            grad_RH, grad_weights_R = _spread(grad_TH, rows_RH, order_R, weights_TK)
            return grad_RH, None, None, grad_weights_R.index_select(0, home_TK.flatten()).view_as(weights_TK)
        grad_RH = grad_TH.index_select(0, order_R // home_TK.shape[1])
        grad_weights_R = (grad_RH * rows_RH).sum(-1, dtype=weights_TK.dtype)
        grad_RH.mul_(weights_TK.flatten().index_select(0, order_R).to(grad_RH.dtype).unsqueeze(1))
        return grad_RH, None, None, grad_weights_R.index_select(0, home_TK.flatten()).view_as(weights_TK)


@chain
def _sum(rows_RH: Tensor, home_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    rows_TKH = rows_RH[home_TK].to(torch.promote_types(rows_RH.dtype, torch.float32))
    if weights_TK is not None:
        rows_TKH = rows_TKH * weights_TK.unsqueeze(-1)
    return rows_TKH.sum(1).to(rows_RH.dtype)


@chain
def _spread(grad_TH: Tensor, rows_RH: Tensor, order_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows, and of the weights of rows: float32 [R]."""
    grad_RH = grad_TH[order_R // weights_TK.shape[1]].to(weights_TK.dtype)
    grad_weights_R = (grad_RH * rows_RH).sum(-1)
    return (grad_RH * weights_TK.flatten()[order_R].unsqueeze(1)).to(rows_RH.dtype), grad_weights_R
