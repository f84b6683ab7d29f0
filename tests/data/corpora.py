"""Small corpora and configurations for the tests of the text path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aria_train.config import RunConfig
from aria_train.data.text.indexed import IndexedWriter

END = 2


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> Path:
    """A corpus of the given documents, as they are."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return prefix


def random_documents(count: int, longest: int, seed: int = 0, vocab_size: int = 1000) -> list[list[int]]:
    """Documents of 1 to `longest` tokens ending with END."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, count)
    return [[*rng.integers(3, vocab_size, length).tolist(), END] for length in lengths]


def run_config(run_dir: Path, sources: dict[str, Path], weights: Sequence[float] = (), **train: Any) -> RunConfig:
    """A configuration over text corpora, the same ones for training and validation."""
    weights = weights or [1.0] * len(sources)
    entries = [
        {"name": name, "path": str(path), "weight": weight} for (name, path), weight in zip(sources.items(), weights)
    ]
    settings = {"context_length": 64, "global_batch_size": 8, "max_steps": 100, "run_dir": str(run_dir), **train}
    data = {"train": entries, "validation": entries}
    return RunConfig.model_validate({"stage": "test", "model": {"vocab_size": 1024}, "data": data, "train": settings})
