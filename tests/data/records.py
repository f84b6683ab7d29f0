"""Pictures, and records about them, for the tests of multimodal preparation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from aria_train.config import ModelConfig, VisionConfig
from aria_train.data.multimodal.formats import Encoder, Recipe
from aria_train.data.multimodal.store import Sample
from aria_train.data.text.tokenizer import load_tokenizer

VISION = VisionConfig(patch_size=14, image_sizes={56: 4, 112: 16}, min_image_size=28, position_grid=8)
MODEL = ModelConfig(vocab_size=1024, vision=VISION)
PICTURE = "<fim_prefix><|img|><fim_suffix>"
IMAGE = {"type": "image", "text": None}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, width: int, height: int) -> None:
    noise(width, height).save(path)


def recipe_for(tokenizer: str, format: str, **options) -> Recipe:
    loss = "assistant" if format == "chat" else "text"
    return replace(Recipe(tokenizer=tokenizer, model=MODEL, format=format, loss=loss), **options)


def encode(tokenizer: str, format: str, record: dict, folder: Path, **options) -> Sample:
    return Encoder(recipe_for(tokenizer, format, **options)).encode(record, f"{folder}/records.jsonl:1")


def text_of(tokenizer: str, ids) -> str:
    return load_tokenizer(tokenizer).decode([int(token) for token in ids], skip_special_tokens=False)


def learned(tokenizer: str, sample: Sample) -> str:
    return text_of(tokenizer, sample.token_ids[sample.loss == 1])


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def user(*items) -> dict:
    return {"role": "user", "content": [*items]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text(value: str) -> dict:
    return {"type": "text", "text": value}
