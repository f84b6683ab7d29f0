"""Safetensors files, read and written in pieces.

The format is 8 bytes (length of the header), a JSON header (name -> dtype, shape, place), then raw little-endian data.
Files are read and written with plain system calls rather than memory maps: what a map touches counts as memory of the
process, and a checkpoint may be many times larger than the memory there is.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aria_train.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_CONVERT_AT_ONCE = 2**24
"""Values converted to another dtype at a time when writing."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; nothing is read before `read`."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) along the first dimension (all of them by default), on the CPU, as stored."""
        shape = self.shape
        if shape:
            stop = shape[0] if stop is None else stop
            assert 0 <= start <= stop <= shape[0]
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = _bytes_of(tensor)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + start * row_bytes)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise OSError("the file ends early")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {self.name} cannot be read: {error}.") from None
        return tensor


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder by its name: of the files its index lists, else of all `*.safetensors`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. A Hugging Face checkpoint is a folder with config.json.")
    index_path = folder / INDEX_NAME
    indexed: dict[str, str] = {}
    if index_path.is_file():
        indexed = _read_index(index_path)
        paths = [folder / name for name in sorted(set(indexed.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder}: no .safetensors files here. Only safetensors are read (pickled .bin files can run code): "
            f"convert the checkpoint with transformers' save_pretrained."
        )
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in found:
                raise CheckpointError(f"{folder}: tensor {name} is in both {found[name].path.name} and {path.name}.")
            found[name] = tensor
    absent = sorted(set(indexed) - set(found))
    if absent:
        raise CheckpointError(
            f"{index_path}: lists {len(absent)} tensor(s) that their files do not have: {summary(absent)}. The files "
            f"and the index are not of the same checkpoint; fetch it again."
        )
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of its file, in the same folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        valid = all(Path(name).name == name for name in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error!r}.") from None
    if not valid:
        raise CheckpointError(f"{path}: names files outside its folder.")
    return dict(weight_map)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError where the header and the file do not agree."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header cannot be {length} bytes long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored_tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though the checkpoint's index lists it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}.") from None


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], data_start: int, file_size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name} is {entry['dtype']}; only {', '.join(_DTYPES)} are read")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(side) for side in entry["shape"])
    begin, end = (int(place) for place in entry["data_offsets"])
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} does not fill bytes {begin} to {end}")
    if data_start + end > file_size:
        raise ValueError(f"the file ends before tensor {name} does (a download cut short?)")
    return StoredTensor(path, name, dtype, shape, data_start + begin)


class ShardWriter:
    """Writes tensors of known names and shapes, in one dtype, into as few files as their size allows.

    The layout is fixed beforehand, so that tensors, and pieces of one tensor, may come in any order and are on disk as
    soon as `write` returns.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        assert dtype in _DTYPE_NAMES
        self._dtype = dtype
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._remaining = {name: math.prod(shape) for name, shape in self._shapes.items()}
        self.unfinished = set(shapes)
        """Tensors of which something is still to be written."""
        self._places: dict[str, tuple[int, int]] = {}  # open file, first byte
        self._files: list[int] = []
        shards = self._assign(max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start_file(folder / file_name, names)
            weight_map.update(dict.fromkeys(names, file_name))
        if len(shards) > 1:
            values = sum(self._remaining.values())
            totals = {"total_parameters": values, "total_size": values * dtype.itemsize}
            index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _assign(self, max_shard_bytes: int) -> list[list[str]]:
        """Names of each file, in order; a tensor above the limit gets a file to itself."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in self._shapes:
            if shards[-1] and size + self._bytes(name) > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self._bytes(name)
        return shards

    def _start_file(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + self._bytes(name)
            shape = list(self._shapes[name])
            header[name] = {"dtype": _DTYPE_NAMES[self._dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._files.append(file)
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.truncate(file, 8 + len(text) + end)
        for name in names:
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor, offsets: Sequence[int] | None = None) -> None:
        """Writes a whole tensor, or the box of it that begins at `offsets`, converted to the writer's dtype."""
        shape = self._shapes[name]
        offsets = (0,) * len(shape) if offsets is None else offsets
        assert all(o + n <= side for o, n, side in zip(offsets, tensor.shape, shape, strict=True))
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        # What follows the last cut dimension is contiguous in the file.
        cut = max((dim for dim, side in enumerate(shape) if tensor.shape[dim] != side), default=0)
        for index in itertools.product(*(range(count) for count in tensor.shape[:cut])):
            corner = [o + i for o, i in itertools.zip_longest(offsets, index, fillvalue=0)]
            self._write_run(name, tensor[index], sum(c * stride for c, stride in zip(corner, strides, strict=True)))
        self._remaining[name] -= tensor.numel()
        assert self._remaining[name] >= 0, f"{name} is written twice"
        if not self._remaining[name]:
            self.unfinished.discard(name)

    def _write_run(self, name: str, run: Tensor, first_value: int) -> None:
        file, offset = self._places[name]
        offset += first_value * self._dtype.itemsize
        flat = run.detach().reshape(-1)
        for part in flat.split(_CONVERT_AT_ONCE) if flat.numel() else ():
            data = _bytes_of(part.to(device="cpu", dtype=self._dtype))
            _write_all(file, data, offset)
            offset += len(data)

    def sync(self) -> None:
        """Waits until the disk has everything."""
        for file in self._files:
            os.fsync(file)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def summary(names: Sequence[str], limit: int = 8) -> str:
    """The first few names of a list."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
