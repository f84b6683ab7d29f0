"""Exponentials of a tile of logits. Shape legend: R positions, C columns of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from aria_train.kernels import blocks


def exponentials(logits_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Puts `exp(logit - peak)` in place of the logits; each row's peak and sum, float32 [R, 1] both.

    Of a few rows at a time, so that what is float32 between logits and exponentials in bf16 never leaves the cache.
    """
    peak_R1, sum_R1 = logits_RC.new_empty(2, logits_RC.shape[0], 1, dtype=torch.float32)
    for rows in blocks(logits_RC):
        block, peak = logits_RC[rows], peak_R1[rows]
        precise = block.float()
        torch.amax(precise, -1, keepdim=True, out=peak)
        torch.sum(precise.sub_(peak).exp_(), -1, keepdim=True, out=sum_R1[rows])
        block.copy_(precise)
    return peak_R1, sum_R1
