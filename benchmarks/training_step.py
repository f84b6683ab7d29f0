"""A training step (forward, backward, AdamW) of the whole model against transformers' Aria with the same weights.

Each side has a process of its own: ours set up as `aria-train train` sets its own up, theirs as PyTorch leaves it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig, VisionConfig
from aria_train.data.work import forward_flops
from aria_train.model import AriaModel
from aria_train.model.vision import images_to_batch
from aria_train.parallel.mesh import keep_freed_memory
from aria_train.train.optimizer import create_moments
from benchmarks.measure import DTYPES, Run, compare, in_own_process, peak_memory
from benchmarks.peers import aria, transformers_aria
from benchmarks.table import Row

IMAGE_TOKEN = ModelConfig().image_token_id


@dataclass(frozen=True)
class Shape:
    """One window of text, or of text with images."""

    vocab_size: int = 4096
    num_experts: int = 64
    tokens: int = 4096
    precision: str = "fp32"
    hidden_size: int = 256
    num_layers: int = 4
    images: int = 0

    def __str__(self) -> str:
        images = f", {self.images} images" if self.images else ""
        return (
            f"{self.precision}, {self.tokens} tokens{images}, {self.num_experts} experts, vocabulary "
            f"{self.vocab_size // 1024}K, {self.num_layers} x {self.hidden_size}"
        )

    def model(self) -> ModelConfig:
        vision = None
        if self.images:
            vision = VisionConfig(
                hidden_size=192, num_layers=4, num_heads=3, mlp_size=768, patch_size=14, position_grid=16,
                image_sizes={112: 16, 224: 64}, min_image_size=28,
            )  # fmt: skip
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.hidden_size // 64,
            num_kv_heads=self.hidden_size // 64,
            head_dim=64,
            num_experts=self.num_experts,
            top_k=6 if self.num_experts >= 64 else 4,
            expert_size=self.hidden_size // 2 if self.num_experts >= 64 else self.hidden_size,
            num_shared_experts=2,
            vision=vision,
        )


TEXT = [
    Shape(vocab, experts, tokens, precision)
    for precision, (vocab, experts, tokens) in itertools.product(
        DTYPES, [(4096, 16, 512), (4096, 64, 512), (4096, 64, 4096), (32768, 16, 4096), (32768, 64, 4096)]
    )
]
MULTIMODAL = [Shape(tokens=2048, precision=precision, images=24) for precision in DTYPES]


def rows(turns: int, ceilings: dict[str, float], shapes: list[Shape]) -> list[Row]:
    found = []
    for shape in [shape for shape in shapes if shape.precision in ceilings]:
        found.append(row(shape, turns, ceilings[shape.precision]))
        print(f"  {shape}: {found[-1].comparison.ratio:.2f}x", flush=True)
    return found


def row(shape: Shape, turns: int, ceiling: float) -> Row:
    threads = torch.get_num_threads()
    with (
        in_own_process(build_ours, shape, threads=threads) as ours_run,
        in_own_process(build_theirs, shape, threads=threads) as theirs_run,
    ):
        comparison = compare(ours_run, theirs_run, turns, warmup=3)
    ours, theirs = (peak_memory(build, shape, threads=threads) for build in (build_ours, build_theirs))
    batch = ours_batch(shape)
    patches = batch.images.starts.diff().tolist() if batch.images is not None else []
    share = 3 * forward_flops([shape.tokens], patches, shape.model()) / comparison.seconds[0] / ceiling
    what = "training step, text and images" if shape.images else "training step, text"
    return Row(what, "transformers' Aria", comparison, str(shape), share, ours / theirs, state_bytes(shape) / theirs)


def state_bytes(shape: Shape) -> int:
    """Weights, their gradients and AdamW's two moments, all in one precision: the least that a step can do with."""
    with torch.device("meta"):
        numel = sum(p.numel() for p in AriaModel(shape.model()).parameters())
    return 4 * numel * DTYPES[shape.precision].itemsize


def build_ours(shape: Shape) -> Run:
    keep_freed_memory()
    model = aria(shape.model(), DTYPES[shape.precision])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    create_moments(optimizer)
    batch = ours_batch(shape)
    config = shape.model()

    def run() -> None:
        output = model(batch)
        routing = output.router.prob_sums.sum() * config.balance_coefficient + output.router.z_sum.sum() * 1e-5
        ((output.loss_sum / batch.num_targets) + routing / shape.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def build_theirs(shape: Shape) -> Run:
    model: Any = transformers_aria(aria(shape.model(), DTYPES[shape.precision]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, _ = tokens_and_labels(shape)
    arguments: dict[str, Any] = {"input_ids": ids[None], "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)[None]}
    if shape.images:
        squares, mask = padded(shape)
        arguments |= {"pixel_values": squares.to(DTYPES[shape.precision]), "pixel_mask": mask}

    def run() -> None:
        model(**arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def tokens_and_labels(shape: Shape) -> tuple[Tensor, Tensor]:
    """Random text, in which each image takes the place of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.vocab_size, (shape.tokens,), generator=generator)
    for index in range(shape.images):
        start = 5 + index * (shape.tokens // shape.images)
        ids[start : start + 64] = IMAGE_TOKEN
    labels = ids.roll(-1)
    labels[labels == IMAGE_TOKEN] = -100
    labels[-1] = -100
    return ids, labels


def ours_batch(shape: Shape) -> MicroBatch:
    ids, labels = tokens_and_labels(shape)
    starts = torch.tensor([0, shape.tokens], dtype=torch.int32)
    batch = MicroBatch(ids, labels, starts, shape.tokens, torch.zeros(1, dtype=torch.int64))
    if shape.images:
        vision = shape.model().vision
        assert vision is not None
        batch.images = images_to_batch(pictures(shape), vision)
    return batch


def pictures(shape: Shape) -> list[Tensor]:
    """Images of half the area of their squares, upright and lying in turns."""
    generator = torch.Generator().manual_seed(0)
    sides = [(224, 112), (112, 224)]
    return [torch.rand(3, *sides[index % 2], generator=generator) * 2 - 1 for index in range(shape.images)]


def padded(shape: Shape) -> tuple[Tensor, Tensor]:
    """[B, 3, 224, 224], and which pixels are an image's."""
    squares = torch.full((shape.images, 3, 224, 224), -1.0)
    mask = torch.zeros(shape.images, 224, 224, dtype=torch.bool)
    for index, picture in enumerate(pictures(shape)):
        height, width = picture.shape[1:]
        squares[index, :, :height, :width] = picture
        mask[index, :height, :width] = True
    return squares, mask
