"""A small model that sees, a tokenizer for it, and checkpoints of it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from aria_train.config import ModelConfig, RunConfig
from aria_train.data.text.tokenizer import train_tokenizer
from aria_train.model import AriaModel
from aria_train.model.init import initialise
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Manifest

VOCABULARY = 384
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "mlp_size": 40,
    "patch_size": 4,
    "position_grid": 6,
    "image_sizes": {16: 3, 32: 6},
    "min_image_size": 8,
}
# Weights drawn wide, so that what is likeliest is so by a margin and depends on all that was read.
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "top_k": 2,
    "expert_size": 16,
    "num_shared_experts": 1,
    "rope_base": 1000.0,
    "init_std": 0.25,
    "max_positions": 512,
    "balance_group_size": 2,
    "vision": VISION,
}
WORDS = "the quick brown fox jumps over the lazy dog and reads a number in every window of the garden . 0 1 2 3\n"


def small_model(seed: int = 0, **changes: Any) -> AriaModel:
    model = AriaModel(ModelConfig.model_validate({**MODEL, **changes}))
    initialise(model, model.config.init_std, seed)
    return model.eval()


def small_tokenizer(folder: Path) -> str:
    train_tokenizer([WORDS * 20], VOCABULARY, folder / "tokenizer")
    return str(folder / "tokenizer")


def small_config(folder: Path, **sections: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "stage": "small",
        "model": MODEL,
        "train": {"context_length": 64, "max_steps": 1, "run_dir": str(folder / "run"), "micro_batch_size": 2},
    }
    defaults["train"]["global_batch_size"] = 2
    return RunConfig.model_validate({**defaults, **sections})


def save_checkpoint(model: AriaModel, config: RunConfig, step: int = 1) -> Path:
    """A checkpoint in the configuration's run directory."""
    folder = checkpoint.folder_of_step(Path(config.train.run_dir), step)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    manifest = Manifest(step, 0, config.model_dump(mode="json"), {"world_size": 1, "expert_parallel_size": 1}, {}, {})
    checkpoint.save_alone(folder, lambda at: dcp.save(tensors, checkpoint_id=at, no_dist=True), manifest)
    return folder


def picture(width: int = 20, height: int = 14, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def last_json(text: str) -> Any:
    """What a command prints on its last line."""
    return json.loads(text.rstrip().splitlines()[-1])


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids of ordinary text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, VOCABULARY, (count,), generator=generator).tolist()


def text_corpus(folder: Path, tokenizer: str, documents: int = 12) -> str:
    """A text corpus of short and long documents with sentences; returns its prefix."""
    from aria_train.data.text.tokenizer import load_tokenizer
    from tests.tiny import write_corpus

    encode = load_tokenizer(tokenizer)
    generator = np.random.default_rng(0)
    words = WORDS.replace("\n", " ").replace(" .", "").split()
    texts = []
    for _ in range(documents):
        sentences = [" ".join(generator.choice(words, 6)) + "." for _ in range(generator.integers(2, 30))]
        texts.append(" ".join(sentences))
    ids = [[*encode.encode(text, add_special_tokens=False).ids, 2] for text in texts]
    return write_corpus(folder / "text", ids)


def chat_corpus(folder: Path, tokenizer: str, name: str, samples: int, seed: int = 0) -> str:
    """A prepared corpus of questions about an image of varying size; returns its folder."""
    from aria_train.data.multimodal.formats import Recipe
    from aria_train.data.prepare.multimodal import prepare_multimodal

    raw = folder / f"{name}_raw"
    raw.mkdir(parents=True)
    records = []
    for number in range(samples):
        (raw / f"{number}.png").write_bytes(picture(8 + number % 20, 10 + number % 7, seed + number))
        records.append({"question": "which number ?", "answer": str(number % 4), "images": [f"{number}.png"]})
    lines = write_lines(raw / "questions.jsonl", records)
    recipe = Recipe(tokenizer, ModelConfig.model_validate(MODEL), "chat", "assistant")
    prepare_multimodal(folder / name, [str(lines)], recipe)
    return str(folder / name)
