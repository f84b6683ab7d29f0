"""`aria-train import` and `aria-train export`: Hugging Face folders in and out, streaming."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from aria_train.config import RunConfig, TrainConfig
from aria_train.errors import CheckpointError
from aria_train.model.hf import Progress as OnProgress
from aria_train.model.hf import model_config_from_hf, open_sink, read_tensors
from aria_train.model.hf.checkpoint import read_distributed, write_distributed
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Manifest
from aria_train.train.adapters import MergingSink, bottom_of


def run_import(args: argparse.Namespace) -> None:
    """A Hugging Face folder becomes a checkpoint that `checkpoint.init_from` takes."""
    target = Path(args.checkpoint)
    model = model_config_from_hf(args.hf_dir)
    source = read_tensors(args.hf_dir, model)
    train = TrainConfig(max_steps=1, context_length=min(8192, model.max_positions), precision="fp32")
    config = RunConfig(stage="import", model=model, train=train)
    layout = {"world_size": 1, "expert_parallel_size": 1}
    manifest = Manifest(step=0, tokens=0, config=config.model_dump(mode="json"), layout=layout, sources={}, files={})
    with _progress(f"importing {args.hf_dir}", bytes_per_value=4) as advance:
        try:
            checkpoint.save_alone(target, lambda folder: write_distributed(source, folder, progress=advance), manifest)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error}. Nothing was left behind.") from None
    print(f"{source.num_values:,} values in {len(source.shapes)} tensors -> {target}")


def run_export(args: argparse.Namespace) -> None:
    """The weights of a checkpoint become a Hugging Face folder that transformers loads."""
    folder = checkpoint.resolve(args.checkpoint)
    manifest = checkpoint.read_manifest(folder)
    config = RunConfig.model_validate(manifest.config)
    config.model.rope_base = config.rope_base_at(manifest.tokens)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with (
        _progress(f"exporting {folder}", bytes_per_value=dtype.itemsize) as advance,
        open_sink(args.hf_dir, config.model, dtype) as sink,
    ):
        base = bottom_of(folder)
        read_distributed(base, sink if base == folder else MergingSink(sink, folder), progress=advance)
    print(f"{len(sink.shapes)} tensors in {args.dtype} -> {args.hf_dir}")


@contextmanager
def _progress(title: str, bytes_per_value: int) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=None)

        def advance(_name: str, done: int, total: int) -> None:
            progress.update(task, completed=done * bytes_per_value, total=total * bytes_per_value)

        yield advance
