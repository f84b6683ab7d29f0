"""Routing of tokens to experts and back, as gathers that sum on the way. Shape legend: T tokens, H hidden, E experts,
K experts per token, R = T * K rows sorted by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def stable_argsort(values: Tensor, bound: int) -> Tensor:
    """The stable order of small integers, int64 in [0, bound): by radix where they fit 16 bits, as NumPy does."""
    if bound > 1 << 16:
        return values.argsort(stable=True)
    narrow = values.numpy().astype(np.uint8 if bound <= 1 << 8 else np.uint16)
    return torch.from_numpy(narrow.argsort(kind="stable"))


def sum_rows(rows_RH: Tensor, home_TK: Tensor) -> Tensor:
    """The sum of each token's rows -> [T, H]. No gradient."""
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
        return F.embedding_bag(home_TK, rows_RH, mode="sum", per_sample_weights=weights_TK.to(rows_RH.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows_RH, home_TK, order_R, weights_TK = ctx.saved_tensors
        grad_RH = grad_TH.index_select(0, order_R // home_TK.shape[1])
        grad_weights_R = (grad_RH * rows_RH).sum(-1, dtype=weights_TK.dtype)
        grad_RH.mul_(weights_TK.flatten().index_select(0, order_R).to(grad_RH.dtype).unsqueeze(1))
        return grad_RH, None, None, grad_weights_R.index_select(0, home_TK.flatten()).view_as(weights_TK)
