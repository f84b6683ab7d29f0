"""Between Hugging Face folders and distributed checkpoints (DCP), a piece of a tensor at a time.

A 25B model passes through in about a gigabyte of memory: DCP asks for each piece as it writes it, and hands over each
piece as it reads it. One process does it, without a process group.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from aria_train.errors import CheckpointError
from aria_train.model.hf.tensors import Progress, PublishedTensors, TensorSink, row_pieces
from aria_train.parallel.checkpoint import Folder
from aria_train.parallel.checkpoint import reader as checkpoint_reader


def write_distributed(
    source: PublishedTensors,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    prefix: str = "model.",
    progress: Progress | None = None,
) -> None:
    """Writes the tensors of a Hugging Face folder as distributed-checkpoint files, each under `prefix` + our name."""
    # One file per piece: within a file the writer keeps every tensor in memory until the file's end.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    _unwrapped(dcp.save, storage_writer=writer, planner=_Saver(source, dtype, prefix, progress))


def read_distributed(
    folder: Folder, sink: TensorSink, prefix: str = "model.", progress: Progress | None = None
) -> None:
    """Feeds the tensors of a distributed checkpoint whose names begin with `prefix` to a sink.

    Pieces have the sizes they were saved in. Raises CheckpointError where names or shapes are not the model's.
    """
    reader = checkpoint_reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in stored.items():
        ours = name.removeprefix(prefix)
        if name.startswith(prefix) and isinstance(tensor, TensorStorageMetadata):
            sink.check(ours, tuple(tensor.size))
    missing = sorted(name for name in sink.shapes if prefix + name not in stored)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensor(s) of the model missing, such as {missing[0]}.")
    _unwrapped(dcp.load, storage_reader=reader, planner=_Loader(sink, prefix, progress))


def _unwrapped(operation: Any, **arguments: Any) -> None:
    """Runs dcp.save or dcp.load, which hide what went wrong inside an exception of their own."""
    try:
        operation({}, no_dist=True, **arguments)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class _Saver(SavePlanner):
    """Plans every tensor as pieces, and reads a piece when DCP is about to write it."""

    def __init__(self, source: PublishedTensors, dtype: torch.dtype, prefix: str, progress: Progress | None) -> None:
        self._source, self._dtype, self._prefix, self._progress = source, dtype, prefix, progress
        self._done = 0

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        assert is_coordinator, "one process imports"

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(name, *rows) for name, s in self._source.shapes.items() for rows in row_pieces(s)])

    def _item(self, name: str, start: int, stop: int) -> WriteItem:
        shape = self._source.shapes[name]
        offsets = torch.Size([start, *[0] * (len(shape) - 1)])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([stop - start, *shape[1:]]))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self._dtype), size=torch.Size(shape))
        index = MetadataIndex(self._prefix + name, offsets)
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        chunk, name = write_item.tensor_data.chunk, write_item.index.fqn.removeprefix(self._prefix)
        start = chunk.offsets[0]
        piece = self._source.read(name, start, start + chunk.sizes[0]).to(self._dtype)
        self._done += piece.numel()
        if self._progress:
            self._progress(name, self._done, self._source.num_values)
        return piece


class _Loader(LoadPlanner):
    """Asks for every piece as it was saved, and passes it on."""

    def __init__(self, sink: TensorSink, prefix: str, progress: Progress | None) -> None:
        self._sink, self._prefix, self._progress = sink, prefix, progress
        self._done, self._total = 0, sum(math.prod(shape) for shape in sink.shapes.values())
        self._dtypes: dict[str, torch.dtype] = {}
        self._items: list[ReadItem] = []

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        for name in self._sink.shapes:
            tensor = metadata.state_dict_metadata[self._prefix + name]
            assert isinstance(tensor, TensorStorageMetadata)
            self._dtypes[name] = tensor.properties.dtype
            self._items += [self._item(self._prefix + name, chunk) for chunk in tensor.chunks]

    @staticmethod
    def _item(key: str, chunk: ChunkStorageMetadata) -> ReadItem:
        index, corner = MetadataIndex(key, chunk.offsets), torch.Size([0] * len(chunk.sizes))
        return ReadItem(LoadItemType.TENSOR, index, corner, index, corner, chunk.sizes)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty(read_item.lengths, dtype=self._dtypes[read_item.dest_index.fqn.removeprefix(self._prefix)])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        name = read_item.dest_index.fqn.removeprefix(self._prefix)
        self._sink.write(name, tensor, read_item.dest_index.offset)
        self._done += tensor.numel()
        if self._progress:
            self._progress(name, self._done, self._total)
