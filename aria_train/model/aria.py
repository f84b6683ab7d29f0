"""Aria: a mixture-of-experts decoder that reads text and images (arXiv 2410.05993).

    token ids -> embed ---------------------------\
                                                   + -> decoder layers -> norm -> head, cross-entropy
    patches -> vision encoder -> projector -------/     (attention, MoE)
               (native resolution)  (visual tokens take the places of image tokens)

This is plain PyTorch for one device. Everything parallel is applied from outside by `parallel/shard.py`.
Documents and images are packed end to end: there is no batch dimension and no padding.
Shape legend: T tokens, H hidden, V vocabulary, L layers, E experts, N positions with a target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train.batch import IGNORE_LABEL, ImageBatch, MicroBatch
from aria_train.config import ModelConfig, Part
from aria_train.errors import DataError
from aria_train.model.cache import Cache
from aria_train.model.decoder import DecoderLayer, Documents, RMSNorm
from aria_train.model.init import initialise
from aria_train.model.loss import linear_cross_entropy
from aria_train.model.projector import Projector
from aria_train.model.recompute import Recompute, run_layer
from aria_train.model.vision import VisionEncoder, images_to_batch
from aria_train.moe.router import RouterStats


def part_of(name: str) -> Part:
    """Which part of the model a parameter belongs to, by its name."""
    if name.startswith("vision."):
        return "vision"
    return "projector" if name.startswith("projector.") else "decoder"


class AriaOutput(NamedTuple):
    """Sums over the micro-batch; the trainer divides by totals of the global batch."""

    loss_sum: Tensor
    """float32 []: cross-entropy summed over targets, differentiable."""
    token_losses: Tensor
    """float32 [N]: the same per target position, without gradient."""
    router: RouterStats
    """Routing statistics stacked over layers: counts and prob_sums [L, E], z_sum and entropy_sum [L]."""


class AriaModel(nn.Module):
    """The whole model; the decoder alone when `config.vision` is None. Weights are initialised from seed 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        self.rope_base = config.rope_base  # a stage may change it step by step
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision: VisionEncoder | None = None
        self.projector: Projector | None = None
        if config.vision is not None:
            self.vision = VisionEncoder(config.vision)
            self.projector = Projector(config.vision, config.hidden_size)
        if not self.embed.weight.is_meta:
            initialise(self, config.init_std, seed=0)

    def forward(self, batch: MicroBatch) -> AriaOutput:
        """Next-token loss of a micro-batch."""
        hidden_TH, router = self.hidden_states(batch)
        loss_sum, token_losses_N = self.loss(hidden_TH, batch)
        return AriaOutput(loss_sum, token_losses_N, router)

    def set_recompute(self, recompute: Recompute) -> None:
        """Which activations the backward pass recomputes, in the decoder and in the vision encoder."""
        self.recompute = recompute
        if self.vision is not None:
            self.vision.recompute = recompute

    def hidden_states(self, batch: MicroBatch, cache: Cache | None = None) -> tuple[Tensor, RouterStats]:
        """Final normalised hidden states [T, H], and routing statistics of all layers.

        With a cache the batch's documents go on where the cache's end.
        """
        x_TH = self.embed(batch.token_ids)
        if self.vision is not None and self.projector is not None:
            # Also without images: every rank must run, and reduce, the same modules in the same order.
            images = batch.images or ImageBatch.empty(self.vision.config.patch_size, x_TH.device)
            visual_tokens = self.projector(self.vision(images), images)
            x_TH = self._place(visual_tokens, x_TH, batch)
        documents = Documents.build(batch, self.config.head_dim, self.rope_base, cache)
        stats: list[RouterStats] = []
        for index, layer in enumerate(self.layers):
            x_TH, layer_stats = run_layer(layer, x_TH, documents.of_layer(index), self.recompute)
            stats.append(layer_stats)
        return self.norm(x_TH), stack_stats(stats)

    def loss(self, hidden_TH: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the batch's targets, given its final hidden states: the sum, and each target's. See
        AriaOutput."""
        assert batch.target_positions is not None
        targets_NH = hidden_TH.index_select(0, batch.target_positions)
        labels_N = batch.labels.index_select(0, batch.target_positions)
        return linear_cross_entropy(targets_NH, self.head.weight, labels_N)

    def _place(self, visual_tokens: Tensor, x_TH: Tensor, batch: MicroBatch) -> Tensor:
        """Puts visual tokens, in order, where the token ids say image."""
        if visual_tokens.shape[0] == 0:
            return x_TH + visual_tokens.sum()  # nothing to place, yet the encoder stays in the graph
        places = batch.visual_positions
        if places is None:
            places = (batch.token_ids == self.config.image_token_id).nonzero().squeeze(1)
        if places.shape[0] != visual_tokens.shape[0]:
            raise DataError(
                f"{places.shape[0]} image token(s) (id {self.config.image_token_id}) stand in the text, but the images "
                f"become {visual_tokens.shape[0]} visual tokens. Each image needs as many as its size class says."
            )
        return x_TH.index_copy(0, places, visual_tokens.to(x_TH.dtype))

    def target_logits(self, batch: MicroBatch, cache: Cache | None = None) -> Tensor:
        """Logits at the batch's target positions alone, for evaluation and generation: float32 [N, V]."""
        hidden_TH, _ = self.hidden_states(batch, cache)
        assert batch.target_positions is not None
        return F.linear(hidden_TH.index_select(0, batch.target_positions), self.head.weight).float()

    def logits(self, token_ids: Tensor, images: list[Tensor] | None = None) -> Tensor:
        """Logits of every position, for evaluation: token ids int64 [B, S] -> float32 [B, S, V].

        images: float [3, H, W], normalised, H and W multiples of the patch size (right and bottom padded with -1), in
        order of appearance; each becomes as many visual tokens as its size class says.
        """
        num_rows, length = token_ids.shape
        starts = torch.arange(0, (num_rows + 1) * length, length, dtype=torch.int32, device=token_ids.device)
        flat = token_ids.flatten()
        batch = MicroBatch(flat, torch.full_like(flat, IGNORE_LABEL), starts, length, torch.zeros_like(flat[:num_rows]))
        if images:
            assert self.config.vision is not None, "this model has no vision encoder"
            batch.images = images_to_batch(images, self.config.vision).to(token_ids.device)
        hidden_TH, _ = self.hidden_states(batch)
        return F.linear(hidden_TH, self.head.weight).float().view(num_rows, length, -1)


def stack_stats(stats: list[RouterStats]) -> RouterStats:
    """One RouterStats whose tensors have a leading layer dimension."""
    return RouterStats(*(torch.stack(column) for column in zip(*stats, strict=True)))
