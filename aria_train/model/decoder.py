"""The decoder: pre-norm residual blocks of multi-head attention and mixture-of-experts, a MoE in every layer.

Shape legend: T tokens (documents packed end to end), H hidden, N heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train import kernels
from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig
from aria_train.kernels.compiled import chain
from aria_train.kernels.norm import rms_norm
from aria_train.model.attention import document_attention
from aria_train.model.cache import Cache
from aria_train.model.rope import apply_rope, rope_tables
from aria_train.moe.layer import MoELayer
from aria_train.moe.router import RouterStats


@dataclass
class Documents:
    """Where documents start, and the rotation of every position in them; the same for all layers."""

    starts: Tensor
    """int32 [documents + 1]"""
    max_length: int
    cos: Tensor
    """float32 [T, D / 2]"""
    sin: Tensor
    cache: Cache | None = None
    layer: int = 0

    @classmethod
    def build(cls, batch: MicroBatch, head_dim: int, rope_base: float, cache: Cache | None = None) -> Documents:
        positions = batch.position_ids() if cache is None else cache.place(batch.starts)
        cos, sin = rope_tables(positions, head_dim, rope_base)
        return cls(batch.starts, batch.max_document, cos, sin, cache)

    def of_layer(self, layer: int) -> Documents:
        return self if self.cache is None else replace(self, layer=layer)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (rms_norm if kernels.by_hand(x) else _rms_norm)(x, self.weight, self.eps)


@chain
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor, documents: Documents) -> Tensor:
        q, k, v = (project(x_TH).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k = apply_rope(q, documents.cos, documents.sin), apply_rope(k, documents.cos, documents.sin)
        starts, max_length = documents.starts, documents.max_length
        if documents.cache is None:
            mixed_TND = document_attention(q, k, v, starts, max_length, causal=True)
        else:
            mixed_TND = documents.cache.attend(documents.layer, q, k, v, starts, max_length)
        out: Tensor = self.o(mixed_TND.flatten(1))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = MoELayer(config)

    def forward(self, x_TH: Tensor, documents: Documents) -> tuple[Tensor, RouterStats]:
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), documents)
        mixed_TH, stats = self.moe(self.moe_norm(x_TH))
        return x_TH + mixed_TH, stats
