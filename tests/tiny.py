"""A model, a corpus and a configuration small enough that a training step takes milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aria_train.config import RunConfig
from aria_train.data.text.indexed import IndexedWriter

VOCABULARY = 96

# Weights drawn wide enough that attention and routing are far from uniform, and coefficients large enough that every
# term of the objective moves the weights.
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "top_k": 2,
    "expert_size": 16,
    "num_shared_experts": 1,
    "rope_base": 1000.0,
    "init_std": 0.15,
    "balance_group_size": 2,
    "balance_coefficient": 0.05,
    "expert_balance_coefficient": 0.02,
    "z_coefficient": 0.01,
}


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.generic] = np.uint16) -> str:
    """A corpus of the given token ids; returns its prefix."""
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return str(prefix)


def random_documents(count: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Documents whose tokens follow one another with some regularity, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    documents = []
    for length in generator.integers(shortest, longest + 1, count):
        steps = generator.integers(1, 4, length)
        documents.append(((generator.integers(VOCABULARY) + np.cumsum(steps)) % VOCABULARY).tolist())
    return documents


def unequal_corpora(folder: Path) -> list[dict[str, Any]]:
    """Two sources whose windows of 32 hold from half to all of the positions they could."""
    folder.mkdir(parents=True, exist_ok=True)
    long = write_corpus(folder / "long", random_documents(90, 17, 33, seed=1))
    mixed = random_documents(40, 2, 20, seed=2) + random_documents(4, 40, 90, seed=3)
    short = write_corpus(folder / "short", mixed)
    return [{"name": "long", "path": long, "weight": 2.0}, {"name": "short", "path": short, "weight": 1.0}]


def tiny_config(run_dir: Path, sources: Sequence[dict[str, Any]], **sections: dict[str, Any]) -> RunConfig:
    """A run of 5 steps of 12 windows of 32 tokens, in fp32. `sections` win key by key."""
    defaults: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"train": list(sources), "workers": 1},
        # With the usual eps Adam turns the rounding of a vanishing gradient into a step as large as any other's.
        "optimizer": {"lr": 2e-3, "clip_norm": 0.5, "eps": 1e-6},
        "schedule": {"warmup_tokens": 1000, "total_tokens": 4000},
        "train": {
            "context_length": 32,
            "global_batch_size": 12,
            "max_steps": 5,
            "seed": 3,
            "precision": "fp32",
            "run_dir": str(run_dir),
            "device": "cpu",
        },
        "checkpoint": {"interval_steps": 0},
    }
    names = defaults.keys() | sections.keys()
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}
    return RunConfig.model_validate({"stage": "tiny", **merged})


def with_values(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with other values, validated again."""
    data = config.model_dump(mode="json")
    for section, values in sections.items():
        data[section].update(values)
    return RunConfig.model_validate(data)


def read_steps(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on the clock and the machine."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    machine = ("tokens_per_second", "step_seconds", "memory_gib")
    machine += ("straggler", "straggler_in", "straggler_times_median")
    return [{key: value for key, value in json.loads(line).items() if key not in machine} for line in lines]
