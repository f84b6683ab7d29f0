"""The projector: turns an image's patches into a few visual tokens of the decoder's width.

One cross-attention layer, whose learned queries look at the patches of their own image, then a feed-forward network.
An image of the smaller size class is read by the first 128 queries, one of the larger by all 256 (arXiv 2410.05993,
section 2.2). As released there are two projections before the attention (the model's own, then the attention's), no
residual connections, and LayerNorms with PyTorch's default epsilon.

Shape legend: P patches of all images, Q learned queries, M visual tokens of all images, C vision hidden, H decoder
hidden, N heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train.batch import ImageBatch
from aria_train.config import VisionConfig
from aria_train.model.attention import cross_attention
from aria_train.model.vision import ImageSpans


class Projector(nn.Module):
    """Packed features to packed visual tokens."""

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = vision
        size = vision.hidden_size
        self.head_dim = size // vision.num_heads
        self.query = nn.Parameter(torch.empty(max(vision.image_sizes.values()), size))
        self.attention_norm, self.kv_norm, self.output_norm = (nn.LayerNorm(size) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)
        self.linear = nn.Linear(size, size)
        self.linear_in = nn.Linear(size, hidden_size, bias=False)
        self.linear_out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: Tensor, images: ImageBatch) -> Tensor:
        """Features [P, C] -> visual tokens [M, H], M = sum of `images.num_queries`, image after image.

        Without images, [0, H] with a zero gradient to every parameter.
        """
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        # Queries do not depend on the image: they are projected once, and each image takes the first of them.
        query_QC = F.linear(self.q(self.attention_norm(self.query)), q_weight, q_bias)
        query_MC = torch.cat([query_QC[:0], *(query_QC[:count] for count in images.num_queries)])
        normed_PC = self.kv_norm(features)
        key_PC = F.linear(self.k(normed_PC), k_weight, k_bias)
        value_PC = F.linear(self.v(normed_PC), v_weight, v_bias)

        if images.num_queries:
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (query_MC, key_PC, value_PC))
            mixed_MC = cross_attention(q, k, v, images, ImageSpans.build(images, self.config).max_patches).flatten(1)
        else:
            mixed_MC = query_MC + key_PC + value_PC  # attention over nothing, yet all three stay in the graph

        mixed_MC = self.output_norm(self.linear(self.out_proj(mixed_MC)))
        out: Tensor = self.linear_out(F.gelu(self.linear_in(mixed_MC), approximate="tanh"))
        return out
