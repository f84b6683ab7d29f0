"""Attention over short documents in bf16.

The forward pass is PyTorch's kernel. Its backward pass in bf16 reaches a few percent of the speed of matrix products,
the fewer the shorter the documents; up to some hundred tokens plain products over many documents and heads are faster.

Shape legend: B documents of equal length, N heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train import kernels

_AT_ONCE = 1 << 20
"""Scores that are worked on at a time."""
_LONGEST = 512
"""Queries and keys of a document up to which this is faster."""

_softmax_backward = torch.ops.aten._softmax_backward_data.out


def is_short(q_BNQD: Tensor, k_BNKD: Tensor) -> bool:
    """Whether `short_attention` is the faster way, and can be taken: on a CPU, below float32, a key head per head."""
    few = max(q_BNQD.shape[2], k_BNKD.shape[2]) <= _LONGEST and q_BNQD.shape[1] == k_BNKD.shape[1]
    return few and kernels.on_cpu(q_BNQD) and q_BNQD.dtype.itemsize < 4 and torch.is_grad_enabled()


def short_attention(q_BNQD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, causal: bool) -> Tensor:
    """`softmax(q @ k.mT / sqrt(D)) @ v` -> [B, N, Q, D]; causal: query i sees keys up to i, and Q = K."""
    return _ShortAttention.apply(q_BNQD, k_BNKD, v_BNKD, causal)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        documents, scale = q.shape[:2], 1 / math.sqrt(q.shape[-1])
        q, k, v, grad = (x.flatten(0, 1) for x in (q * scale, k, v, grad))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        future = q.new_full((q.shape[1], k.shape[1]), -torch.inf).triu_(1) if ctx.causal else None
        at_once = max(1, _AT_ONCE // (q.shape[1] * k.shape[1]))
        rooms = q.new_empty(2, min(at_once, len(q)), q.shape[1], k.shape[1])
        for start in range(0, len(q), at_once):
            part = slice(start, start + at_once)
            weights, grads = rooms[:, : len(q[part])]
            torch.bmm(q[part], k[part].mT, out=weights)
            if future is not None:
                weights.add_(future)
            torch.softmax(weights, -1, out=weights)
            torch.bmm(weights.mT, grad[part], out=grad_v[part])
            torch.bmm(grad[part], v[part].mT, out=grads)
            _softmax_backward(grads, weights, -1, grads.dtype, grad_input=grads)
            torch.bmm(grads, k[part], out=grad_q[part])
            torch.bmm(grads.mT, q[part], out=grad_k[part])
        return (*(x.unflatten(0, documents) for x in (grad_q.mul_(scale), grad_k, grad_v)), None)
