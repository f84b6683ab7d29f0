"""Output head and cross-entropy as one operation that never holds the logits of a whole window.

Logits exist for one chunk of positions at a time. The gradient of a chunk is worked out while its logits are still
at hand (the loss is the last operation, so its gradient is known up to one scalar), and nothing is recomputed.

Shape legend: N positions with a target, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aria_train import kernels

_CHUNK_LOGITS = 2**25
"""Logits held at once (positions x vocabulary)."""
_CHUNK_ROWS_CPU = 256
"""Positions at once on CPU: few, so that a small vocabulary's logits stay in cache."""


def linear_cross_entropy(x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy of `x @ weight.T`, in nats.

    x [N, H] and weight [V, H] in fp32 or bf16, labels int64 [N] in [0, V). Returns the sum over positions (float32
    scalar, differentiable) and the loss of each position (float32 [N], for reports only).
    """
    return LinearCrossEntropy.apply(x_NH, weight_VH, labels_N, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
        losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        # Sums over chunks stay in float32 whatever the weights are in. A frozen head needs none.
        train_weight = with_grad and ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train_weight else None
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        if kernels.on_cpu(x):
            rows = min(rows, _CHUNK_ROWS_CPU)
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = (x[part] @ weight.T).float()
            logits -= logits.amax(-1, keepdim=True)
            target = logits.gather(1, labels[part, None])
            partition = logits.exp_().sum(-1, keepdim=True)
            losses[part] = (partition.log() - target).squeeze(1)
            if grad_x is None:
                continue
            probabilities = logits.div_(partition)
            probabilities[torch.arange(probabilities.shape[0], device=x.device), labels[part]] -= 1
            grad = probabilities.to(x.dtype)
            torch.mm(grad, weight, out=grad_x[part])
            if grad_weight is not None and x.dtype == torch.float32:
                grad_weight.addmm_(grad.T, x[part])
            elif grad_weight is not None:
                grad_weight += grad.T @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.double().sum().float(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else (grad_weight * grad).to(ctx.dtype)
        return grad_x * grad.to(grad_x.dtype), scaled, None, None
