"""The vision encoder: a SigLIP-type ViT over the patches of all images of a micro-batch, as one packed sequence.

Images keep their own size and aspect ratio: each contributes its valid patches and attends only to itself, so nothing
is computed for padding. The features are the last layer's output: the released model does not use its final norm.

Shape legend: P patches of all images, C vision hidden, N heads, D head width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train import kernels
from aria_train.batch import ImageBatch
from aria_train.config import VisionConfig
from aria_train.data.multimodal.positions import position_ids
from aria_train.errors import DataError
from aria_train.kernels.feed_forward import gelu_linear
from aria_train.model.attention import document_attention
from aria_train.model.recompute import Recompute, run_layer


class VisionEncoder(nn.Module):
    """Packed patches to packed features.

    The final norm (`post_norm`) is part of every published checkpoint and of the 417,792,240 published parameters, but
    nothing reads it: it is kept as two frozen parameters (2 x C), so that weights go in and out whole.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.position_grid**2, size)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(size, config.norm_eps).requires_grad_(False)

    def forward(self, images: ImageBatch) -> Tensor:
        """Features [P, C] in the parameters' dtype. Without images, [0, C] with a zero gradient to every parameter."""
        # Patches do not overlap, so the convolution is one matrix product over flattened patches.
        weight = self.patch_embedding.weight.flatten(1)
        x_PC = F.linear(images.patches.to(weight.dtype), weight, self.patch_embedding.bias)
        x_PC = x_PC + self.position_embedding(images.position_ids)
        spans = ImageSpans.build(images, self.config)
        for layer in self.layers:
            x_PC = run_layer(layer, x_PC, spans, self.recompute)
        return x_PC


class VisionLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_PC: Tensor, spans: ImageSpans) -> Tensor:
        x_PC = x_PC + self.attention(self.norm1(x_PC), spans)
        out: Tensor = x_PC + self.mlp(self.norm2(x_PC))
        return out


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x_PC: Tensor, spans: ImageSpans) -> Tensor:
        q, k, v = (project(x_PC).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        mixed_PND = document_attention(q, k, v, spans.starts, spans.max_patches, causal=False)
        out: Tensor = self.out(mixed_PND.flatten(1))
        return out


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        hidden_PF = self.fc1(x_PC)
        if kernels.by_hand(x_PC):
            return gelu_linear(hidden_PF, self.fc2.weight, self.fc2.bias)
        out: Tensor = self.fc2(F.gelu(hidden_PF, approximate="tanh"))
        return out


@dataclass
class ImageSpans:
    """Where the images stand in the packed sequence; shared by all layers."""

    starts: Tensor
    """int32 [images + 1]"""
    max_patches: int
    """No image has more. Worked out on the host from the size classes, so that no device has to wait."""

    @classmethod
    def build(cls, images: ImageBatch, config: VisionConfig) -> ImageSpans:
        present = set(images.num_queries)
        sides = [size // config.patch_size for size, queries in config.image_sizes.items() if queries in present]
        return cls(images.starts, max(sides, default=0) ** 2)


def images_to_batch(images: list[Tensor], config: VisionConfig) -> ImageBatch:
    """Packs whole images: float [3, H, W] each, normalised, H and W multiples of the patch size.

    The longer side decides the size class, the smallest that holds it, and with it the number of visual tokens. Pixels
    that pad an image to whole patches (right and bottom, -1) belong to it; give no patch that is padding alone.
    Raises DataError for an image of another shape, or larger than the largest class.
    """
    patch = config.patch_size
    parts, ids, num_queries = [], [], []
    for index, image in enumerate(images):
        num_queries.append(_queries_of(index, image, config))
        rows, cols = image.shape[1] // patch, image.shape[2] // patch
        tiles = image.float().reshape(3, rows, patch, cols, patch).permute(1, 3, 0, 2, 4)
        parts.append(tiles.reshape(rows * cols, 3 * patch * patch))
        ids.append(torch.tensor(position_ids(rows, cols, config.position_grid), device=image.device))
    if not parts:
        return ImageBatch.empty(patch)
    starts = list(itertools.accumulate((part.shape[0] for part in parts), initial=0))
    return ImageBatch(torch.cat(parts), torch.cat(ids), torch.tensor(starts, dtype=torch.int32), num_queries)


def _queries_of(index: int, image: Tensor, config: VisionConfig) -> int:
    """Visual tokens of an image, by its size class."""
    patch, classes = config.patch_size, sorted(config.image_sizes)
    fits = image.ndim == 3 and image.shape[0] == 3 and all(side and side % patch == 0 for side in image.shape[1:])
    if not fits:
        raise DataError(
            f"Image {index} has shape {tuple(image.shape)}. An image is [3, height, width] with both sides multiples "
            f"of the patch size {patch}: pad it right and bottom with -1 (black, after normalisation)."
        )
    longer = max(image.shape[1:])
    if longer > classes[-1]:
        raise DataError(
            f"Image {index} is {image.shape[2]} x {image.shape[1]} pixels, more than the largest size class "
            f"{classes[-1]}. Resize its longer side to one of {classes}, or split it into crops."
        )
    return config.image_sizes[next(size for size in classes if longer <= size)]
