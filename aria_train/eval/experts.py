"""Which experts see and which read: the specialisation map of Aria (arXiv 2410.05993, section 5).

For each layer and routed expert, R_v is the share of visual tokens that the expert is chosen for, R_t the share of text
tokens; the map shows R_v / R_t, capped at 50, for each source of the held-out data by itself. Counts are pooled over
the data and all ranks before anything is divided.

Shape legend: S sources, L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aria_train.batch import MicroBatch
from aria_train.config import RunConfig
from aria_train.data.window import Source
from aria_train.eval.loss import held_out_batches
from aria_train.eval.progress import Advance, no_progress
from aria_train.model import AriaModel
from aria_train.parallel.collectives import sum_over_ranks
from aria_train.parallel.mesh import Meshes
from aria_train.parallel.shard import release_parameters

CAP = 50.0
"""Largest ratio shown; also the ratio of an expert that visual tokens choose and text tokens never do."""
VISUAL_ABOVE = 2.0
"""An expert counts as visual where visual tokens choose it so many times as often as text tokens."""
_TEXT, _VISUAL = 0, 1


@dataclass
class ExpertUse:
    """Choices counted over held-out data."""

    sources: list[str]
    choices: Tensor
    """float64 [S, 2, L, E]: tokens of a source, text then visual, that chose an expert."""
    tokens: Tensor
    """float64 [S, 2]: tokens of a source, text then visual."""

    def ratio(self, source: int | None = None) -> Tensor:
        """R_v / R_t of a source, or of all together: float64 [L, E], at most CAP.

        CAP where only visual tokens choose the expert; NaN where no token does, and where a source has no visual or no
        text tokens to compare.
        """
        choices = self.choices.sum(0) if source is None else self.choices[source]
        tokens = self.tokens.sum(0) if source is None else self.tokens[source]
        share_text, share_visual = choices / tokens[:, None, None]
        return (share_visual / share_text).clamp(max=CAP)

    def as_json(self) -> dict[str, Any]:
        """Token counts, the map of every source that has images, and how many experts of each layer are visual."""
        domains: dict[str, Any] = {}
        for name, source in self.domains():
            ratio = self.ratio(source)
            text, visual = (self.tokens.sum(0) if source is None else self.tokens[source]).tolist()
            domains[name] = {
                "text_tokens": int(text),
                "visual_tokens": int(visual),
                "visual_experts": (ratio > VISUAL_ABOVE).sum(1).tolist(),
                "ratio": [[None if value != value else value for value in row] for row in ratio.tolist()],
            }
        return {"cap": CAP, "visual_above": VISUAL_ABOVE, "domains": domains}

    def domains(self) -> list[tuple[str, int | None]]:
        """(name, source) of each source with images, and of all sources together where there are several."""
        seen = [(name, index) for index, name in enumerate(self.sources) if self.tokens[index, _VISUAL]]
        return [*seen, *([("all sources", None)] if len(self.sources) > 1 else [])]


@torch.no_grad()
def count_expert_use(
    model: AriaModel,
    config: RunConfig,
    meshes: Meshes,
    advance: Advance = no_progress,
    sources: Sequence[Source] | None = None,
) -> ExpertUse:
    """Counts the routers' choices over `train.eval_windows` windows of each source of `data.validation`. Collective.

    `sources`: those of `data.validation`, where they are open already.
    """
    names = [source.name for source in config.data.validation]
    size = (len(names), 2, config.model.num_layers, config.model.num_experts)
    choices = torch.zeros(size, dtype=torch.float64, device=meshes.device)
    tokens = torch.zeros(size[:2], dtype=torch.float64, device=meshes.device)
    model.eval()
    with recorded_choices(model) as recorded:
        for batch in held_out_batches(config, meshes, sources):
            nowhere = batch.labels.new_empty(0)
            model.target_logits(dataclasses.replace(batch, target_positions=nowhere))
            kinds = (batch.token_ids == config.model.image_token_id).long()
            groups = 2 * source_of_token(batch) + kinds
            tokens.view(-1).index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
            for layer, experts_TK in enumerate(recorded):
                choices[:, :, layer].add_(_count(groups, experts_TK, size))
            recorded.clear()
            advance(1)
    release_parameters(model)
    sums = sum_over_ranks({"choices": choices, "tokens": tokens}, meshes.device)
    return ExpertUse(names, sums["choices"].cpu(), sums["tokens"].cpu())


def _count(groups_T: Tensor, experts_TK: Tensor, size: tuple[int, ...]) -> Tensor:
    """[S, 2, E]: how often each group of tokens chose each expert."""
    num_sources, kinds, _, num_experts = size
    cells = groups_T[:, None] * num_experts + experts_TK
    counted = torch.bincount(cells.flatten(), minlength=num_sources * kinds * num_experts)
    return counted.double().view(num_sources, kinds, num_experts)


def source_of_token(batch: MicroBatch) -> Tensor:
    """int64 [T]: the source each token came from."""
    return torch.repeat_interleave(batch.source_ids, batch.starts.diff(), output_size=batch.num_tokens)


@contextmanager
def recorded_choices(model: AriaModel) -> Iterator[list[Tensor]]:
    """A list that every forward pass appends each layer's chosen experts to, int64 [T, K], in order of layers."""
    recorded: list[Tensor] = []

    def record(_router: nn.Module, _inputs: Any, output: Any) -> None:
        recorded.append(output[1])

    handles = [layer.moe.router.register_forward_hook(record) for layer in model.layers]  # type: ignore[union-attr]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
