"""Hugging Face weights, in and out.

Whole models: `load_pretrained`, `save_pretrained`. Streams, for models larger than memory: `read_tensors` and
`write_tensors`, which hold one tensor at a time; `PublishedTensors.read` and `open_sink`, which hold a piece of one.
Every tensor is accounted for by name and shape before anything is read, and output appears complete or not at all.
Files are named and laid out as transformers' `save_pretrained` does, and load there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from aria_train.config import ModelConfig
from aria_train.model.aria import AriaModel
from aria_train.model.hf.config import model_config_from_hf
from aria_train.model.hf.siglip import SiglipTensors, read_siglip
from aria_train.model.hf.tensors import Progress, PublishedTensors, TensorSink, open_sink, row_pieces, tensor_shapes

__all__ = [
    "Progress",
    "PublishedTensors",
    "SiglipTensors",
    "TensorSink",
    "load_pretrained",
    "model_config_from_hf",
    "open_sink",
    "read_siglip",
    "read_tensors",
    "save_pretrained",
    "tensor_shapes",
    "write_tensors",
]


def load_pretrained(
    hf_dir: str | Path, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> AriaModel:
    """An AriaModel with the weights of a Hugging Face folder, on the CPU.

    dtype: of the parameters; by default as stored (where tensors differ, the one that holds them all). Raises
    CheckpointError.
    """
    config = model_config_from_hf(hf_dir)
    source = read_tensors(hf_dir, config)
    with torch.device("meta"):
        model = AriaModel(config)
    model = model.to(dtype or source.dtype).to_empty(device="cpu")
    done, total = 0, source.num_values
    for name, target in model.state_dict().items():
        for start, stop in row_pieces(source.shapes[name]):
            target[start:stop].copy_(source.read(name, start, stop))
        done += target.numel()
        if progress:
            progress(name, done, total)
    return model


def save_pretrained(
    model: AriaModel, hf_dir: str | Path, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> None:
    """Writes a model as a Hugging Face folder that transformers loads.

    hf_dir must not exist, or be empty. dtype: of the files; by default that of the parameters. Raises CheckpointError.
    """
    tensors = model.state_dict()
    dtype = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    write_tensors(hf_dir, model.config, tensors.items(), dtype, progress=progress)


def read_tensors(hf_dir: str | Path, config: ModelConfig) -> PublishedTensors:
    """The tensors of a Hugging Face folder, to be iterated: (our name, tensor as stored), one in memory at a time.

    Any published naming is understood. Raises CheckpointError, before any data is read, naming the tensors that are
    missing, too many, or of another shape than `config` says.
    """
    return PublishedTensors(Path(hf_dir), config)


def write_tensors(
    hf_dir: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Writes (our name, tensor) pairs, in any order, as a Hugging Face folder in `dtype`.

    hf_dir must not exist, or be empty; it appears when every tensor of the model is in it. Raises CheckpointError for
    a tensor that is missing, not of the model, given twice, or of another shape; then nothing is left behind.
    """
    with open_sink(hf_dir, config, dtype) as sink:
        done, total = 0, sum(math.prod(shape) for shape in sink.shapes.values())
        for name, tensor in tensors:
            sink.write(name, tensor)
            done += tensor.numel()
            if progress:
                progress(name, done, total)
            del tensor  # before the next one is read
