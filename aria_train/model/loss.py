"""Output head and cross-entropy as one operation that never holds the logits of a whole window.

Logits exist for one chunk of positions at a time, in tiles of the vocabulary. The gradient of a chunk is worked out
while its tiles are still at hand (the loss is the last operation, so its gradient is known up to one scalar), and
nothing is recomputed. Tiles hold exponentials and are never divided by their sums: what is as narrow as the hidden
states is scaled in their place, so a tile is written once and read by two products.

Shape legend: N positions with a target, H hidden, V vocabulary, R positions of a chunk, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aria_train import kernels
from aria_train.kernels.compiled import chain
from aria_train.kernels.exponentials import exponentials

_TILE_LOGITS = 2**25
"""Logits worked on at once (positions x columns)."""
_TILE_CPU = 1024, 2048
"""Positions and columns of a tile on a CPU, where a few passes over it should find it in cache."""
_ALIGNED = 128
"""Of which the sizes of a GPU's tiles are multiples."""
_SMALLEST_SHARE = 1e-30
"""Of the probability that a tile may have: below it, its reciprocal would leave the range of float32."""


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
        num_rows, num_columns = _tile_shape(x, weight)
        columns = list(_slices(weight.shape[0], num_columns))
        # Tiles take the places of the last chunk's: fresh memory would take longer than what is done in it.
        rooms = [x.new_empty(min(num_rows, len(x)), len(weight[c])) if with_grad else None for c in columns]
        for part in _slices(x.shape[0], num_rows):
            tiles = [
                _Tile.of(x[part], weight, labels[part, None], where, room)
                for where, room in zip(columns, rooms, strict=True)
            ]
            log_partition = torch.cat([tile.peak + tile.sum.log() for tile in tiles], 1).logsumexp(1, keepdim=True)
            target = torch.stack([tile.target for tile in tiles]).sum(0)
            losses[part] = (log_partition - target).squeeze(1)
            if grad_x is not None:
                grad_x[part] = _gradients(x[part], weight, tiles, log_partition, target, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.double().sum().float(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grad_weight.mul_(grad).to(ctx.dtype)  # for one backward pass
        return grad_x * grad.to(grad_x.dtype), scaled, None, None


@dataclass
class _Tile:
    """The logits of R positions and C columns of the vocabulary."""

    columns: slice
    exponentials: Tensor | None
    """[R, C] in the weights' dtype: exp(logit - peak)."""
    peak: Tensor
    """float32 [R, 1]: the largest logit."""
    sum: Tensor
    """float32 [R, 1], of the exponentials."""
    label: Tensor
    """int64 [R, 1]: the label's column here; some other where the label lies elsewhere."""
    labelled: Tensor
    """bool [R, 1]: whether the label lies here."""
    target: Tensor
    """float32 [R, 1]: the label's logit, 0 where it lies elsewhere."""

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, labels: Tensor, columns: slice, room: Tensor | None) -> _Tile:
        """Exponentials are kept only in a room given for them, [at least R, C]."""
        logits = torch.mm(x, weight[columns].T, out=None if room is None else room[: len(x)])
        label = (labels - columns.start).clamp(0, logits.shape[1] - 1)
        labelled = label + columns.start == labels
        target = logits.gather(1, label).float() * labelled
        peak, total = (exponentials if kernels.by_hand(logits) else _exponentials)(logits)
        return cls(columns, None if room is None else logits, peak, total, label, labelled, target)


@chain
def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Puts `exp(logit - peak)` in place of the logits; each row's peak and sum, float32 [R, 1] both."""
    peak = logits.amax(-1, keepdim=True).float()
    precise = (logits - peak).exp_()
    total = precise.sum(-1, keepdim=True)
    logits.copy_(precise)
    return peak, total


def _gradients(
    x: Tensor, weight: Tensor, tiles: list[_Tile], log_partition: Tensor, target: Tensor, grad_weight: Tensor | None
) -> Tensor:
    """The gradient of the chunk's summed loss with respect to x, float32 [R, H]; that of the weight is added."""
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    # A label's probability less one, taken in float32: bf16 would round a probability near 1 first, and leave nothing.
    excess = (target - log_partition).expm1()
    for tile in tiles:
        assert tile.exponentials is not None
        share = (tile.peak - log_partition).exp().clamp(min=_SMALLEST_SHARE)
        unscaled = tile.exponentials
        at_label = torch.where(tile.labelled, (excess / share).to(x.dtype), unscaled.gather(1, tile.label))
        unscaled[torch.arange(len(x), device=x.device), tile.label.squeeze(1)] = at_label.squeeze(1)
        grad_x.addcmul_(unscaled @ weight[tile.columns], share)
        if grad_weight is not None and x.dtype == torch.float32:
            grad_weight[tile.columns].addmm_(unscaled.T, x * share)
        elif grad_weight is not None:
            grad_weight[tile.columns].add_(unscaled.T @ (x * share).to(x.dtype))
    return grad_x


def _tile_shape(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Positions of a chunk, and columns of its tiles.

    Each chunk reads and writes the weight's gradient in float32, which takes a GPU as long as the products of some
    hundred positions. With about as many positions as hidden columns that is little beside them; the chunk's tiles,
    which wait for their sums, take no more memory than that gradient does. Tiles are alike, and a multiple of
    `_ALIGNED` wide: rows of odd length would start where no tensor core can load them.
    """
    (vocabulary, width), positions = weight.shape, x.shape[0]
    rows = max(1, _TILE_LOGITS // vocabulary)
    if kernels.on_cpu(x):
        return min(rows, _TILE_CPU[0]), _TILE_CPU[1]
    rows = _alike(positions, max(rows, width))
    return rows, _alike(vocabulary, _TILE_LOGITS // rows)


def _alike(length: int, most: int) -> int:
    """The size of as few parts as there can be of at most so many each, all about as large: a multiple of _ALIGNED."""
    parts = -(-length // max(_ALIGNED, most // _ALIGNED * _ALIGNED))
    return -(-length // (max(1, parts) * _ALIGNED)) * _ALIGNED or _ALIGNED


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
