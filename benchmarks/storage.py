"""Saving and loading a checkpoint beside writing and reading as many bytes plainly."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel import checkpoint
from benchmarks.measure import compare, forget
from benchmarks.table import Row

TENSORS, SIZE = 24, 2**22
"""Of fp32: 384 MiB."""


def rows(turns: int) -> list[Row]:
    """Both sides leave their bytes on the disk (fsync); what is read was dropped from the page cache before."""
    tensors = {f"tensor{index}": torch.randn(SIZE) for index in range(TENSORS)}
    with tempfile.TemporaryDirectory(dir=".") as name, one_process():
        folder, plain = Path(name) / "step_00000001", Path(name) / "plain"

        def save() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            checkpoint.save(folder, tensors, checkpoint.Manifest(1, 0, {}, {}, {}, {}))

        def load() -> None:
            forget(folder.rglob("*"))
            checkpoint.load(folder, tensors)

        def write_plainly() -> None:
            with plain.open("wb") as file:
                for tensor in tensors.values():
                    file.write(tensor.numpy().data)
                os.fsync(file.fileno())

        def read_plainly() -> None:
            forget([plain])
            with plain.open("rb") as file:
                for tensor in tensors.values():
                    file.readinto(tensor.numpy().data)

        saved, loaded = compare(save, write_plainly, turns), compare(load, read_plainly, turns)
    return [
        Row("checkpoint, saved and verified", "plain write and fsync", saved, speeds(tensors, saved.seconds[0])),
        Row("checkpoint, verified and loaded", "plain read", loaded, speeds(tensors, loaded.seconds[0])),
    ]


def speeds(tensors: dict[str, Tensor], seconds: float) -> str:
    size = sum(tensor.nbytes for tensor in tensors.values())
    return f"{size / 2**20:.0f} MiB, ours at {size / seconds / 1e9:.2f} GB/s"


@contextmanager
def one_process() -> Iterator[None]:
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()
