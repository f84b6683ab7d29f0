"""Held-out loss, the same windows every time, summed over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.config import RunConfig
from aria_train.data.loader import validation_batches
from aria_train.data.window import Source
from aria_train.eval.progress import Advance, no_progress
from aria_train.model import AriaModel
from aria_train.parallel.collectives import all_ranks, sum_over_ranks
from aria_train.parallel.mesh import Meshes
from aria_train.parallel.shard import release_parameters


@torch.no_grad()
def evaluate_loss(
    model: AriaModel,
    config: RunConfig,
    meshes: Meshes,
    advance: Advance = no_progress,
    sources: Sequence[Source] | None = None,
) -> dict[str, float]:
    """`loss` over all held-out targets and `loss/<source>` of each source, in nats per target token. Collective.

    `sources`: those of `data.validation`, where they are open already.
    """
    names = [source.name for source in config.data.validation]
    losses = torch.zeros(len(names), dtype=torch.float64, device=meshes.device)
    targets = torch.zeros_like(losses)
    model.eval()
    for batch in held_out_batches(config, meshes, sources):
        token_losses: Tensor = model(batch).token_losses.double()
        source_ids = batch.source_of_target()
        losses.index_add_(0, source_ids, token_losses)
        targets.index_add_(0, source_ids, torch.ones_like(token_losses))
        advance(1)
    release_parameters(model)
    sums = sum_over_ranks({"losses": losses, "targets": targets}, meshes.device)
    result = {"loss": float(sums["losses"].sum() / sums["targets"].sum().clamp(min=1))}
    for index, name in enumerate(names):
        result[f"loss/{name}"] = float(sums["losses"][index] / sums["targets"][index].clamp(min=1))
    return result


def held_out_batches(
    config: RunConfig, meshes: Meshes, sources: Sequence[Source] | None = None
) -> Iterator[MicroBatch]:
    """This rank's share of the windows of `data.validation`, on its device; `source_ids` index the sources.

    Ranks run the same number of forward passes, because experts may live elsewhere: one that has run out of windows
    gets empty micro-batches until all have. Collective.
    """
    batches = iter(validation_batches(config, meshes.rank, meshes.world_size, sources))
    for _ in itertools.count():
        batch = next(batches, None)
        if all_ranks(batch is None, meshes.device):
            return
        yield (batch or empty_batch()).to(meshes.device)


def most_batches(config: RunConfig, meshes: Meshes) -> int:
    """Micro-batches that a rank gets at most."""
    per_source = -(-config.train.eval_windows // (meshes.world_size * config.train.micro_batch_size))
    return per_source * len(config.data.validation)


def empty_batch() -> MicroBatch:
    """A micro-batch of no tokens."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(none, none, torch.zeros(1, dtype=torch.int32), 0, none)
