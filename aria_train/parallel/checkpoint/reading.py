"""Loading a checkpoint at any layout, after its bytes have been compared with the manifest's checksums.

Nothing in a checkpoint can run code: tensors are read as plain weights, and the index of tensors, a pickle, by a
reader that builds the few classes an index consists of and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from aria_train.errors import CheckpointError
from aria_train.model.aria import part_of
from aria_train.parallel.checkpoint.manifest import Manifest, read_manifest
from aria_train.parallel.checkpoint.storage import Folder
from aria_train.parallel.collectives import broadcast_object, gather_objects

INDEX = ".metadata"
_LARGEST_INDEX = 2**32
_BLOCK = 1 << 22


def load(
    folder: Folder,
    tensors: Mapping[str, Tensor],
    parts: Collection[str] | None = None,
    verified: bool = False,
    index: Metadata | None = None,
) -> None:
    """Fills the tensors, at whatever layout they have now, from a checkpoint. Collective.

    Tensors are filled in place, from one saved shard at a time. Raises CheckpointError, before anything is filled, if
    a file is damaged, or if the checkpoint lacks one of the tensors or holds it in another shape. Model tensors that it
    has beyond them are an error too, unless they belong to a part of the model that is not among `parts`. `verified`
    says that `verify` has just passed, and need not be repeated; `index` is what `read_index` gave, if it was called.
    """
    if not verified:
        verify(folder)
    index = read_index(folder) if index is None else index
    _check_names(folder, stored_shapes(folder, index), tensors, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=reader(folder, index))


def _check_names(
    folder: Folder,
    stored: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    parts: Collection[str] | None,
) -> None:
    """Every wanted tensor is in the checkpoint, in the same shape, and no model tensor of these parts is left over."""
    missing = sorted(set(tensors) - set(stored))
    extra = sorted(name for name in set(stored) - set(tensors) if name.startswith("model."))
    if parts is not None:
        extra = [name for name in extra if part_of(name.removeprefix("model.")) in parts]
    differing = [
        f"{name} is {stored[name]} there and {tuple(tensors[name].shape)} here"
        for name in sorted(set(tensors) & set(stored))
        if stored[name] != tuple(tensors[name].shape)
    ]
    problems = [f"{len(missing)} tensor(s) missing there, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} tensor(s) too many there, such as {extra[0]}"] if extra else []
    problems += [f"{len(differing)} of another shape: {differing[0]}"] if differing else []
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {'; '.join(problems)}. "
            "Use a checkpoint of this architecture, or another train.run_dir to start afresh."
        )


def stored_shapes(folder: Folder, index: Metadata | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint. `index` as in `load`."""
    stored = (read_index(folder) if index is None else index).state_dict_metadata
    return {name: tuple(m.size) for name, m in stored.items() if isinstance(m, TensorStorageMetadata)}


# ---------------------------------------------------------------------------------------------------------------------
# Checksums


def verify(folder: Folder, manifest: Manifest | None = None) -> None:
    """Compares every file with its checksum, each rank a share of them. Collective where there is a process group.

    `manifest` is the checkpoint's, if it has been read. Raises CheckpointError, on all ranks alike, naming the damaged
    file.
    """
    manifest = broadcast_object(lambda: read_manifest(folder)) if manifest is None else manifest
    reports = [report for report in gather_objects(_compare(folder, manifest.files)) if report]
    if reports:
        raise CheckpointError(reports[0])


def _compare(folder: Folder, files: Mapping[str, Mapping[str, int]]) -> str | None:
    """Compares this rank's share of the files, dealt out by size; returns a sentence about the first damaged one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[rank::world]:
        try:
            found = fingerprint(folder / name)
        except Exception as error:  # What an object store may raise has no common type.
            return f"checkpoint {folder} cannot be read: {name}: {error}. Use another checkpoint."
        if found != files[name]:
            return (
                f"checkpoint {folder} is damaged: {name} does not match the checksum it was written with. "
                "Use another checkpoint."
            )
    return None


def fingerprint(path: Folder) -> dict[str, int]:
    """Bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


# ---------------------------------------------------------------------------------------------------------------------
# Reading without running code

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": set[str](),
    "torch": {
        "Size",
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes of an index; a pickle that asks for anything else is not one."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
        return super().find_class(module, name)


def read_index(folder: Folder) -> Metadata:
    """A checkpoint's index: which tensors there are, and where. Megabytes for thousands of ranks, so read it once."""
    try:
        with (folder / INDEX).open("rb") as file:
            content = file.read(_LARGEST_INDEX + 1)
        if len(content) > _LARGEST_INDEX:
            raise ValueError("it is too large")
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        for entry in metadata.state_dict_metadata.values():
            if not isinstance(entry, TensorStorageMetadata):
                raise TypeError("it lists something that is no tensor")
        for place in (metadata.storage_data or {}).values():
            if "/" in place.relative_path:
                raise ValueError(f"it refers to a file elsewhere, {place.relative_path!r:.80}")
    except MemoryError:
        raise
    except Exception as error:  # A pickle can fail in any way.
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {INDEX}: {error!s:.200}. Use another checkpoint."
        ) from None
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


class _PathReader(dcp.FileSystemReader):
    index: Metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


def reader(folder: Folder, index: Metadata | None = None) -> dcp.FileSystemReader:
    """What `dcp.load` reads a checkpoint through. `index` as in `load`."""
    made = _PathReader(folder) if isinstance(folder, Path) else _url_reader(folder.url)
    made.index = read_index(folder) if index is None else index
    return made


def _url_reader(url: str) -> Any:
    # Imports fsspec and its many modules, which files of this machine do without.
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    class UrlReader(FsspecReader):
        index: Metadata

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return self.index

    return UrlReader(url)
