"""Checkpoints of adapters: they hold the adapters alone, and name the checkpoint beneath, the base.

Whoever wants whole weights, to start from, to evaluate, or to export, gets the base with the adapters merged into it.
Beside its checkpoints a run keeps the newest adapters as a folder that PEFT loads, `RUN_DIR/adapter`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aria_train.config import ModelConfig, RunConfig
from aria_train.errors import CheckpointError, DataError
from aria_train.model import AriaModel
from aria_train.model.hf.tensors import TensorSink
from aria_train.model.init import local_shard
from aria_train.model.lora import Adapters, adapter_shapes, from_peft, is_adapter, peft_config, to_peft
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Folder, SaveFailed
from aria_train.parallel.checkpoint.reading import fingerprint
from aria_train.publish import replacing

BASE = "train.base"
"""Name of the saved tensor that tells which checkpoint is beneath the adapters."""
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base_mark(base: Folder) -> Tensor:
    """int64 [1]: CRC-32 of a checkpoint's manifest, and so of all that is in it."""
    return torch.tensor([fingerprint(base / checkpoint.MANIFEST)["crc32"]])


def base_of(folder: Folder) -> Folder | None:
    """The checkpoint beneath a checkpoint of adapters; None for one of whole weights.

    It is looked for where it was and, should the run directories have moved together, where it would be now. Raises
    CheckpointError if it is in neither place, or another is.
    """
    config = RunConfig.model_validate(checkpoint.read_manifest(folder).config)
    if config.train.lora is None:
        return None
    given = config.checkpoint.init_from
    assert given is not None, "a run of adapters has a base"
    places: list[str | Folder] = [given]
    if isinstance(folder, Path) and "://" not in given:
        places.append(folder.parent.parent / os.path.relpath(given, config.train.run_dir))
    mark = _read(folder, [BASE])[BASE]
    for place in places:
        try:
            base = checkpoint.resolve(place)
        except CheckpointError:
            continue
        if torch.equal(base_mark(base), mark):
            return base
    raise CheckpointError(
        f"{folder} holds adapters alone, and {given}, whose weights they were trained on, is not there or is another "
        "checkpoint now. Put it back."
    )


def load_whole(folder: Folder, tensors: Mapping[str, Tensor], parts: Collection[str] | None = None) -> None:
    """Like `checkpoint.load`, for weights alone; adapters come merged into their base. Collective."""
    base = base_of(folder)
    if base is None:
        checkpoint.load(folder, tensors, parts)
        return
    load_whole(base, tensors, parts)
    adapters = read_adapters(folder)
    for name, tensor in tensors.items():
        weight = name.removeprefix("model.")
        if adapters.adapts(weight):
            shard, offsets = local_shard(tensor)
            delta = adapters.delta(weight, offsets, tuple(shard.shape))
            shard.copy_(shard.float() + delta.to(shard.device))


def bottom_of(folder: Folder) -> Folder:
    """The checkpoint of whole weights at the bottom."""
    base = base_of(folder)
    return folder if base is None else bottom_of(base)


class MergingSink(TensorSink):
    """A sink of Hugging Face weights that is fed from the bottom checkpoint, and adds all adapters above it."""

    def __init__(self, sink: TensorSink, folder: Folder) -> None:
        self.sink, self.shapes = sink, sink.shapes
        self._adapters: list[Adapters] = []
        base = base_of(folder)
        while base is not None:
            self._adapters.append(read_adapters(folder))
            folder, base = base, base_of(base)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        self.sink.check(name, shape)

    def write(self, name: str, tensor: Tensor, offsets: Sequence[int] | None = None) -> None:
        start = tuple(offsets) if offsets is not None else (0,) * tensor.ndim
        for adapters in self._adapters:
            if adapters.adapts(name):
                tensor = tensor.float() + adapters.delta(name, start, tuple(tensor.shape))
        self.sink.write(name, tensor, offsets)


def read_adapters(folder: Folder) -> Adapters:
    """The adapters of a checkpoint, whole, in this process's memory."""
    config = RunConfig.model_validate(checkpoint.read_manifest(folder).config)
    assert config.train.lora is not None
    names = [name for name in checkpoint.stored_shapes(folder) if name.startswith("model.") and is_adapter(name)]
    return Adapters(config.train.lora, {n.removeprefix("model."): t for n, t in _read(folder, names).items()})


def _read(folder: Folder, names: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, without other ranks."""
    stored = checkpoint.reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name in names:
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=checkpoint.reader(folder), no_dist=True)
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Folders that PEFT loads


def write_adapter_folder(folder: Folder, target: Path) -> None:
    """A checkpoint's adapters as `target`, complete or not there. Raises SaveFailed where it cannot be written."""
    config = RunConfig.model_validate(checkpoint.read_manifest(folder).config)
    adapters, has_vision = read_adapters(folder), config.model.vision is not None
    settings = peft_config(adapters.config, has_vision, str(config.checkpoint.init_from))
    try:
        with replacing(target, overwrite=True, what="adapters") as fresh:
            save_file(to_peft(adapters, has_vision), fresh / _WEIGHTS, metadata={"format": "pt"})
            (fresh / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except (OSError, DataError) as error:
        raise SaveFailed(f"{target} could not be written: {error}") from None


def fill_adapters(model: AriaModel, config: ModelConfig, path: str) -> None:
    """Fills a sharded model's adapters from a folder that PEFT or this program wrote.

    Raises CheckpointError where they are not adapters of this model, of this rank and these targets.
    """
    try:
        stored = load_file(Path(path) / _WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"train.lora.init_from: {path}/{_WEIGHTS} cannot be read: {error}.") from None
    try:
        ours = from_peft(stored, adapter_shapes(model), config.vision is not None)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"train.lora.init_from: {path} does not hold the adapters of this model under train.lora's rank and "
            f"targets: {error}."
        ) from None
    for name, parameter in model.named_parameters():
        if name in ours:
            shard, offsets = local_shard(parameter.detach())
            box = tuple(slice(start, start + size) for start, size in zip(offsets, shard.shape, strict=True))
            shard.copy_(ours[name][box])
