"""Four stages that take seconds: language, then images, then long windows, then chat."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from PIL import Image
from torch import Tensor

from aria_train.config import VisionConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.store import Placement, Sample, Writer
from aria_train.parallel import checkpoint
from tests.tiny import MODEL, random_documents, write_corpus

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_size": 32,
    "patch_size": 7,
    "position_grid": 4,
    "image_sizes": {14: 3, 28: 5},
    "min_image_size": 7,
}
IMAGE, PREFIX, SUFFIX, END, NEWLINE = 9, 39, 41, 2, 10
FIRST = 42
"""Token ids of text are this or more."""
NAMES = ("one_language", "two_images", "three_long", "four_chat")

Part = int | bytes
"""Of a sample: so many tokens of text, or an image file."""


def png(seed: int, width: int = 14, height: int = 14) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(parts: Sequence[tuple[Part, bool]], seed: int) -> Sample:
    """A sample of parts, each with whether its text is learned; the end-of-document token is."""
    generator = np.random.default_rng(seed)
    vision = VisionConfig(**VISION)
    tokens: list[int] = []
    loss: list[int] = []
    placements: list[Placement] = []
    for part, learned in parts:
        if isinstance(part, int):
            tokens += generator.integers(FIRST, MODEL["vocab_size"], part).tolist()
            loss += [int(learned)] * part
        else:
            layout = images.layout_of(*images.read_size(part), vision)
            placements.append(Placement(len(tokens) + 1, layout))
            tokens += [PREFIX, *[IMAGE] * layout.num_tokens, SUFFIX]
            loss += [0] * (layout.num_tokens + 2)
    files = [part for part, _ in parts if isinstance(part, bytes)]
    return Sample(
        np.array([*tokens, END], np.int32), np.array([*loss, 1], np.uint8), files, placements, "test", f"sample:{seed}"
    )


def write_samples(folder: Path, samples: Sequence[Sample], format: str, **details: Any) -> str:
    """A multimodal corpus of the given samples; returns its folder."""
    sizes = {str(size): queries for size, queries in VISION["image_sizes"].items()}
    with Writer(folder) as writer:
        for sample in samples:
            writer.add(sample)
        writer.close(
            format=format,
            divisible=format != "chat",
            image_token_id=IMAGE,
            image_sizes=sizes,
            newline_ids=[NEWLINE],
            **details,
        )
    return str(folder)


def write_text(prefix: Path, count: int, shortest: int, longest: int) -> str:
    """A text corpus without special tokens; returns its prefix."""
    documents = random_documents(count, shortest, longest, seed=longest)
    return write_corpus(prefix, [[FIRST + token % (MODEL["vocab_size"] - FIRST) for token in d] for d in documents])


def captions(folder: Path, count: int = 60) -> str:
    samples = [make_sample([(png(n), False), (3 + n % 9, True)], seed=n) for n in range(count)]
    return write_samples(folder, samples, "captions")


def conversations(folder: Path, count: int = 40, longest: int = 20) -> str:
    """Questions, some about an image, with answers; only answers are learned."""
    samples = []
    for n in range(count):
        picture: list[tuple[Part, bool]] = [(png(1000 + n), False)] if n % 2 else []
        samples.append(make_sample([*picture, (4 + n % 5, False), (5 + n % (longest - 5), True)], seed=2000 + n))
    return write_samples(folder, samples, "chat")


def write_stages(folder: Path, **changes: dict[str, Any]) -> list[str]:
    """Corpora and the YAMLs of the four stages; `changes` (stage name -> section.key -> value) go into the files."""
    data = folder / "data"
    data.mkdir(parents=True)
    long, short = write_text(data / "long", 60, 20, 150), write_text(data / "short", 120, 5, 33)
    pictures, chats = captions(data / "captions"), conversations(data / "chat")
    text = {"name": "text", "path": short}
    with_vision = {"model": {"vision": VISION}}
    stages: list[dict[str, Any]] = [
        _stage({"model": {"vision": None}, "data": {"train": [{"name": "long", "path": long}, text]}}, steps=5),
        _stage(
            with_vision,
            {
                "data": {"train": [{**text, "weight": 2.0}, {"name": "captions", "path": pictures}]},
                "checkpoint": {"init_fresh": ["vision", "projector"]},
            },
            steps=4,
        ),
        _stage(
            with_vision,
            {
                "model": {"rope_base": 20000.0},
                "data": {
                    "train": [
                        {"name": "long", "path": long, "min_tokens": 60},
                        {"name": "joined", "path": pictures, "concatenate": "window"},
                        {"name": "short", "path": short, "max_tokens": 30, "weight": 0.5},
                    ]
                },
                "schedule": {"rope_from": 1000.0, "rope_tokens": 1000},
                "checkpoint": {"init_optimizer": True},
                "train": {"context_length": 128},
            },
            steps=4,
        ),
        _stage(
            with_vision,
            {
                "model": {"rope_base": 20000.0},
                "data": {"train": [{"name": "chat", "path": chats}]},
                "schedule": {"min_lr_ratio": 0.0},
                "train": {"context_length": 128},
            },
            steps=4,
        ),
    ]
    paths = []
    for name, stage in zip(NAMES, stages, strict=True):
        for key, value in changes.get(name, {}).items():
            target = stage
            *sections, last = key.split(".")
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"stage": name, **stage}))
        paths.append(str(path))
    return paths


def _stage(*parts: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {"workers": 1, "prefetch_batches": 2},
        "optimizer": {"lr": 2e-3, "eps": 1e-6},
        "train": {
            "context_length": 32,
            "global_batch_size": 4,
            "max_steps": steps,
            "precision": "fp32",
            "device": "cpu",
        },
        "checkpoint": {"interval_steps": 2, "keep_last": 2},
    }
    for part in parts:
        for section, values in part.items():
            stage[section] = {**stage.get(section, {}), **values}
    return stage


def read_timeline(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "timeline.jsonl").read_text().splitlines()]


def saved_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint, whole."""
    folder = checkpoint.resolve(run_dir)
    stored = checkpoint.reader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=checkpoint.reader(folder), no_dist=True)
    return tensors
