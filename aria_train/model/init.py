"""Initial weights, a pure function of (seed, parameter name, position): the same at any layout of ranks."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Fills every parameter, or this rank's shard of it: matrices normal, norm gains 1, biases 0, adapters such that
    they change nothing yet. `std` is the decoder's; see `_spread` for the rest."""
    for name, parameter in model.named_parameters():
        shard, offsets = local_shard(parameter)
        if name.endswith(("bias", "lora_B")):
            shard.zero_()
        elif parameter.ndim == 1:
            shard.fill_(1.0)
        else:
            _fill_normal(shard, offsets, parameter.shape, _spread(name, parameter.shape, std), f"{seed}/{name}")


def _spread(name: str, shape: torch.Size, decoder_std: float) -> float:
    """Standard deviation of a matrix.

    The vision encoder and the projector take 1 / sqrt(fan in), whatever their widths. With less, every patch looks
    alike to the projector's queries, and learning to see begins hundreds of steps later.
    """
    if name.endswith("lora_A"):
        return (3 * shape[1]) ** -0.5  # as PEFT spreads them: they stand for a change, not for a weight
    if not name.startswith(("vision.", "projector.")):
        return decoder_std
    if name in ("vision.position_embedding.weight", "projector.query"):
        return 0.5  # tables, which stand beside activations of unit scale
    return math.prod(shape[1:]) ** -0.5


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where in the whole it starts."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    shard = parameter.to_local()
    assert tuple(shape) == tuple(shard.shape)
    return shard, tuple(offsets)


def _fill_normal(shard: Tensor, offsets: tuple[int, ...], shape: torch.Size, std: float, key: str) -> None:
    """Draws the whole tensor (one slab of a 3-D one at a time, so that no rank draws experts it does not hold)."""
    generator = torch.Generator(shard.device)
    slabs = range(shard.shape[0]) if len(shape) == 3 else [None]
    for slab in slabs:
        generator.manual_seed(_hash(key if slab is None else f"{key}/{offsets[0] + slab}"))
        target = shard if slab is None else shard[slab]
        starts = offsets if slab is None else offsets[1:]
        whole = torch.empty(shape if slab is None else shape[1:], dtype=torch.float32, device=shard.device)
        whole.normal_(0.0, std, generator=generator)
        target.copy_(whole[tuple(slice(s, s + n) for s, n in zip(starts, target.shape, strict=True))])


def _hash(key: str) -> int:
    """63 bits, all mixed: generators on the CPU use only the lower 32 bits of their seed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
