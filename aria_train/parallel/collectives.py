"""Small collectives of the training loop: one all-reduce for many figures, and agreement among ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums named tensors over all ranks in one all-reduce, in float64 so that counts stay exact."""
    flat = torch.cat([tensor.detach().to(device, torch.float64).flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensors[name].shape) for part, name in zip(parts, tensors, strict=True)}


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every rank."""
    flag = torch.tensor([0.0 if condition else 1.0], device=device)
    dist.all_reduce(flag)
    return flag.item() == 0
