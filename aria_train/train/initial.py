"""The weights a new run starts from, every one of them accounted for.

Parts of the model (decoder, vision encoder, projector) may come from different places: a checkpoint of an earlier
stage, a SigLIP encoder, or fresh random values. A part is random only where the configuration says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from aria_train.config import LoraConfig, Part, RunConfig
from aria_train.errors import CheckpointError
from aria_train.model import AriaModel
from aria_train.model.aria import part_of
from aria_train.model.hf import read_siglip
from aria_train.model.init import initialise, local_shard
from aria_train.model.lora import adapter_shapes, is_adapter
from aria_train.parallel import checkpoint
from aria_train.parallel.collectives import broadcast_object
from aria_train.train.adapters import bottom_of, fill_adapters, load_whole


def fill_weights(model: AriaModel, config: RunConfig) -> list[str]:
    """Fills every parameter of a sharded model in place. Collective. Returns lines that say what came from where.

    Raises CheckpointError where the named sources do not cover the model exactly.
    """
    initialise(model, config.model.init_std, config.train.seed)
    parts: dict[Part, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parts.setdefault(part_of(name), {})[name] = parameter.detach()
    origin: dict[Part, str] = dict.fromkeys(parts, "fresh random values")
    settings = config.checkpoint
    if settings.init_from is not None:
        # The first rank looks, or a thousand of them would go through the files of as many.
        folder = broadcast_object(lambda: checkpoint.resolve(str(settings.init_from)))
        taken = [p for p in parts if p not in settings.init_fresh and (p != "vision" or not settings.init_vision_from)]
        _load_parts(folder, {part: parts[part] for part in taken})
        origin |= {part: str(folder) for part in taken}
    if settings.init_vision_from is not None:
        _load_siglip(settings.init_vision_from, parts["vision"], config)
        origin["vision"] = settings.init_vision_from
    lines = list(_table(parts, origin, config))
    if config.train.lora is not None:
        lines.append(_start_adapters(model, config, config.train.lora))
    return lines


def _start_adapters(model: AriaModel, config: RunConfig, lora: LoraConfig) -> str:
    if lora.init_from is not None:
        fill_adapters(model, config.model, lora.init_from)
    count = sum(math.prod(shape) for shape in adapter_shapes(model).values())
    return f"{'adapters':<10} {count:>16,} parameters  trained  from {lora.init_from or 'nothing: no change yet'}"


def _load_parts(folder: checkpoint.Folder, parts: dict[Part, dict[str, Tensor]]) -> None:
    """Loads whole parts. A part the checkpoint lacks altogether gets an error that names the ways out."""
    names = checkpoint.stored_shapes(bottom_of(folder))
    stored = {part_of(name.removeprefix("model.")) for name in names if name.startswith("model.")}
    lacking = [part for part in parts if part not in stored]
    if lacking:
        ways = ["checkpoint.init_fresh=[" + ", ".join(lacking) + "] starts them from random values"]
        if "vision" in lacking:
            ways.append("checkpoint.init_vision_from takes the vision encoder from a SigLIP folder")
        raise CheckpointError(f"{folder} holds no weights of: {', '.join(lacking)}. {'; '.join(ways)}.")
    wanted = {f"model.{name}": tensor for tensors in parts.values() for name, tensor in tensors.items()}
    load_whole(folder, wanted, parts=set(parts))


def _load_siglip(folder: str, parameters: dict[str, Tensor], config: RunConfig) -> None:
    assert config.model.vision is not None
    remaining = set(parameters)
    for name, tensor in read_siglip(folder, config.model.vision):
        shard, offsets = local_shard(parameters[name])
        box = tuple(slice(start, start + size) for start, size in zip(offsets, shard.shape, strict=True))
        shard.copy_(tensor[box])
        remaining.discard(name)
    assert not remaining, f"not filled from {folder}: {sorted(remaining)[:3]}"


@torch.no_grad()
def _table(parts: dict[Part, dict[str, Tensor]], origin: dict[Part, str], config: RunConfig) -> Iterator[str]:
    for part, tensors in parts.items():
        count = sum(tensor.numel() for tensor in tensors.values())
        state = "frozen" if part in config.train.freeze or config.train.lora is not None else "trained"
        yield f"{part:<10} {count:>16,} parameters  {state}  from {origin[part]}"
