"""A Hugging Face folder as a set of tensors under our names: a source to read from, a sink to write to.

Both know every tensor of the model beforehand. The source refuses a folder that does not match; the sink publishes
nothing until it has everything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aria_train.config import ModelConfig
from aria_train.errors import CheckpointError
from aria_train.model.aria import AriaModel
from aria_train.model.hf.config import hf_config, hf_preprocessor_config
from aria_train.model.hf.files import ShardWriter, StoredTensor, find_tensors, summary
from aria_train.model.hf.names import canonical, published_name, text_only

Progress = Callable[[str, int, int], None]
"""Called after each tensor: its name (ours), values done so far, values in all."""

Shape = tuple[int, ...]

PIECE_VALUES = 2**25
"""Values of a tensor held at once where one is moved in pieces: 128 MiB in fp32."""


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model (ours) and its shape, in order."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in AriaModel(config).state_dict().items()}


def row_pieces(shape: Shape) -> list[tuple[int, int]]:
    """Ranges of rows that together make a tensor, each of at most PIECE_VALUES values (or one row)."""
    rows = max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)] or [(0, 0)]


class PublishedTensors:
    """The tensors of a Hugging Face folder that a model needs. Iterating reads them one by one: (our name, tensor)."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises CheckpointError unless the folder holds exactly the tensors of the model, in their shapes."""
        self.shapes = tensor_shapes(config)
        """Our name -> shape, in order."""
        self._stored = _match(folder, self.shapes, _unused_shapes(config))

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds every stored value."""
        return functools.reduce(torch.promote_types, {stored.dtype for stored in self._stored.values()})

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor (all of them by default), on the CPU, in the dtype it is stored in."""
        stored = self._stored.get(name)
        if stored is not None:
            return stored.read(start, stop)
        shape = self.shapes[name]
        return torch.zeros((shape[0] if stop is None else stop) - start, *shape[1:], dtype=self.dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.shapes:
            yield name, self.read(name)


def _unused_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Published tensors (canonical names) without values, which have no counterpart here."""
    if config.num_shared_experts:
        return {}
    shapes: dict[str, Shape] = {}
    for layer in range(config.num_layers):
        shared = f"language_model.model.layers.{layer}.mlp.shared_experts"
        shapes |= {f"{shared}.{name}_proj.weight": (0, config.hidden_size) for name in ("gate", "up")}
        shapes[f"{shared}.down_proj.weight"] = (config.hidden_size, 0)
    return shapes


def _match(folder: Path, shapes: Mapping[str, Shape], unused: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """Our name -> stored tensor, or CheckpointError. The final norm of the vision encoder may be absent: see below."""
    found = find_tensors(folder)
    expected = {published_name(name): name for name in shapes}
    matched: dict[str, StoredTensor] = {}
    extra, misshapen = [], []
    for stored_name, stored in found.items():
        name = canonical(stored_name)
        if name.endswith(".rotary_emb.inv_freq") or unused.get(name) == stored.shape:
            continue
        if name not in expected or expected[name] in matched:
            extra.append(stored_name)
            continue
        matched[expected[name]] = stored
        if stored.shape != shapes[expected[name]]:
            misshapen.append(f"{stored_name} is {list(stored.shape)}, not {list(shapes[expected[name]])}")
    # The first releases leave out the vision encoder's final norm, which nothing reads; later ones hold zeros for it.
    missing = [
        published_name(name) for name in shapes if name not in matched and not name.startswith("vision.post_norm")
    ]
    problems = [
        f"{len(names)} {what}: {summary(sorted(names))}"
        for what, names in (("missing", missing), ("too many", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: its tensors are not those of the model. {'; '.join(problems)}. Nothing was imported."
        )
    return matched


class TensorSink:
    """Takes the tensors of a model, or pieces of them, in any order; see `open_sink`."""

    def __init__(self, writer: ShardWriter, shapes: Mapping[str, Shape], published: Mapping[str, str]) -> None:
        self._writer = writer
        self._published = published
        self.shapes = shapes

    def check(self, name: str, shape: Shape) -> None:
        """Raises CheckpointError unless the model has a tensor of this name and shape."""
        if name not in self.shapes:
            raise CheckpointError(f"Tensor {name} {list(shape)} is not one of this model's; nothing was written.")
        if shape != self.shapes[name]:
            raise CheckpointError(
                f"Tensor {name} is {list(shape)}; this model's is {list(self.shapes[name])}. Nothing was written."
            )

    def write(self, name: str, tensor: Tensor, offsets: Sequence[int] | None = None) -> None:
        """Writes a tensor, or the box of it that begins at `offsets`. Raises CheckpointError if it does not belong."""
        if offsets is None:
            self.check(name, tuple(tensor.shape))
        if self._published[name] not in self._writer.unfinished:
            raise CheckpointError(f"Tensor {name} was given twice; nothing was written.")
        self._writer.write(self._published[name], tensor, offsets)


@contextlib.contextmanager
def open_sink(
    hf_dir: str | Path, config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int = 5 * 10**9
) -> Iterator[TensorSink]:
    """A new Hugging Face folder that appears, complete and durable, when the block ends with every tensor written.

    hf_dir must not exist, or be empty. Should anything fail, nothing is left of it. Raises CheckpointError, also
    where the disk is full.
    """
    shapes = tensor_shapes(config)
    unused = _unused_shapes(config)
    name_there = text_only if config.vision is None else str
    published = {name: name_there(published_name(name)) for name in shapes}
    with _new_folder(Path(hf_dir)) as folder:
        layout = {published[name]: shape for name, shape in shapes.items()}
        writer = ShardWriter(
            folder, layout | {name_there(name): s for name, s in unused.items()}, dtype, max_shard_bytes
        )
        with contextlib.closing(writer):
            for name, shape in unused.items():
                writer.write(name_there(name), torch.empty(shape))
            yield TensorSink(writer, shapes, published)
            if writer.unfinished:
                missing = sorted(name for name in shapes if published[name] in writer.unfinished)
                raise CheckpointError(f"{hf_dir}: not written, {len(missing)} tensor(s) missing: {summary(missing)}.")
            writer.sync()
            _write_json(folder / "config.json", hf_config(config, dtype))
            if config.vision is not None:
                _write_json(folder / "preprocessor_config.json", hf_preprocessor_config(config.vision))


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends, and vanishes when it fails."""
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists. Give a new folder, or an empty one.")
    writing = target.with_name(f"{target.name}.writing-{os.getpid()}")
    try:
        writing.mkdir(parents=True)
        yield writing
        writing.rename(target)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot be written: {error}.") from None
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
