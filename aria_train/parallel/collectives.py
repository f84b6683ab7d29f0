"""Small collectives of the training loop: one all-reduce for many figures, and agreement among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.errors import UserError

T = TypeVar("T")


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


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in order of rank; just this one without a process group."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What the first rank of the group makes, on all of them; also where the others would see something else.

    A UserError that it meets is raised on all.
    """
    if not dist.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, group=group, group_src=0)
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])
