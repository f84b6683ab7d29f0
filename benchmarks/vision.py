"""The vision encoder on images as they come, packed, against the same images padded to squares."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from aria_train.config import ModelConfig, VisionConfig
from aria_train.model.vision import images_to_batch
from benchmarks.measure import compare
from benchmarks.peers import aria, transformers_aria
from benchmarks.table import Row

SIZE, PATCH, IMAGES = 490, 14, 64
VISION = VisionConfig(
    hidden_size=128, num_layers=2, num_heads=4, mlp_size=480, patch_size=PATCH, position_grid=35,
    image_sizes={SIZE: 128}, min_image_size=28,
)  # fmt: skip
MODEL = ModelConfig(
    vocab_size=256, hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, num_experts=8, top_k=2,
    expert_size=16, num_shared_experts=1, vision=VISION,
)  # fmt: skip


def rows(turns: int, ceiling: float, images: int = IMAGES) -> list[Row]:
    """Forward and backward over images whose longer side is 490 pixels and whose aspect ratio is between 1:4 and 4:1,
    as transformers' encoder takes them: in one batch of squares with a mask."""
    ours = aria(MODEL, torch.float32)
    theirs = transformers_aria(ours).model.vision_tower
    assert ours.vision is not None
    encoder = ours.vision
    sides = aspect_ratios(images, random.Random(0))
    pictures = [torch.rand(3, height, width) * 2 - 1 for height, width in sides]
    packed = images_to_batch(pictures, VISION)
    squares, mask = squares_of(pictures)

    def run_ours() -> None:
        encoder(packed).sum().backward()

    def run_theirs() -> None:
        features = theirs(squares, patch_attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        features[mask.flatten(1)].sum().backward()

    agree(encoder, theirs, packed, squares, mask)
    comparison = compare(run_ours, run_theirs, turns)
    patches = packed.patches.shape[0]
    flops = 3 * sum(_flops(height * width // PATCH**2) for height, width in sides)
    padded = images * (SIZE // PATCH) ** 2
    shape = f"{images} images of mixed aspect, {patches:,} real patches of {padded:,} ({patches / padded:.0%}), fp32"
    share = flops / comparison.seconds[0] / ceiling
    return [Row("vision encoder, packed", "transformers, padded squares", comparison, shape, share)]


def aspect_ratios(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Heights and widths in pixels, whole patches, the longer side SIZE."""
    sides = []
    for _ in range(count):
        shorter = max(PATCH, round(SIZE / PATCH * 4 ** -rng.random()) * PATCH)
        sides.append((SIZE, shorter) if rng.random() < 0.5 else (shorter, SIZE))
    return sides


def squares_of(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded images [B, 3, SIZE, SIZE], and which patches are an image's: bool [B, SIZE / PATCH, SIZE / PATCH]."""
    squares = torch.full((len(pictures), 3, SIZE, SIZE), -1.0)
    mask = torch.zeros(len(pictures), SIZE // PATCH, SIZE // PATCH, dtype=torch.bool)
    for index, picture in enumerate(pictures):
        height, width = picture.shape[1:]
        squares[index, :, :height, :width] = picture
        mask[index, : height // PATCH, : width // PATCH] = True
    return squares, mask


@torch.no_grad()
def agree(encoder: Any, theirs: Any, packed: Any, squares: Tensor, mask: Tensor) -> None:
    """Both sides compute the same thing."""
    features = theirs(squares, patch_attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(encoder(packed), features[mask.flatten(1)], rtol=1e-3, atol=1e-3)


def _flops(patches: int) -> float:
    """Of a forward pass over one image."""
    size = VISION.hidden_size
    per_patch = 2 * (3 * PATCH**2 * size + VISION.num_layers * (4 * size**2 + 2 * size * VISION.mlp_size))
    return per_patch * patches + 4 * VISION.num_layers * size * patches**2
