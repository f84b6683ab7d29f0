"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of the released weights."""

from __future__ import annotations

import torch
from torch import Tensor

from aria_train import kernels
from aria_train.kernels.compiled import chain
from aria_train.kernels.rope import rotate


def rope_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: int64 [T] -> float32 [T, head_dim / 2] each."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * base**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [T, heads, head_dim] by its tables; element i pairs with element i + head_dim / 2."""
    return rotate(x, cos, sin) if kernels.by_hand(x) else _rotate(x, cos, sin)


@chain
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
