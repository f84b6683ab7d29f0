"""How much computing windows ask for, and windows dealt out to ranks so that all have the same of it.

Two windows of as many tokens differ: attention grows with the square of a document's length, and images pass through
the vision encoder first. With experts spread over ranks, ranks wait for each other in every layer, so what runs side
by side should be alike: the step's windows are sorted by work and cut into rounds of one micro-batch per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aria_train.config import ModelConfig


def forward_flops(document_lengths: ArrayLike, image_patches: ArrayLike, model: ModelConfig) -> float:
    """Floating-point operations of a forward pass over packed documents and the images in them, about."""
    lengths, patches = np.asarray(document_lengths, np.float64), np.asarray(image_patches, np.float64)
    hidden, width = model.hidden_size, model.num_heads * model.head_dim
    projections = 2 * hidden * (width + model.num_kv_heads * model.head_dim)
    experts = 3 * hidden * model.expert_size * (model.top_k + model.num_shared_experts) + hidden * model.num_experts
    per_token = 2 * (model.num_layers * (projections + experts) + hidden * model.vocab_size)
    # Scores and mixing, each 2 * width per pair of positions, half of which the causal mask leaves out.
    flops = per_token * lengths.sum() + 2 * model.num_layers * width * np.square(lengths).sum()
    if model.vision is not None:
        size = model.vision.hidden_size
        per_patch = 2 * model.vision.num_layers * (4 * size**2 + 2 * size * model.vision.mlp_size)
        flops += per_patch * patches.sum() + 4 * model.vision.num_layers * size * np.square(patches).sum()
    return float(flops)


def deal(work: Sequence[float], num_ranks: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Deals a step's windows out: int64 [rounds, ranks, micro_batch_size], the windows by their number in the step.

    What ranks do in the same round is alike, and so are their sums over the step: of the windows of a round, the
    heaviest go to the ranks that have had least.
    """
    heaviest_first = np.argsort(-np.asarray(work, np.float64), kind="stable")
    rounds = heaviest_first.reshape(-1, num_ranks * micro_batch_size)
    dealt = np.empty((len(rounds), num_ranks, micro_batch_size), np.int64)
    had = np.zeros(num_ranks)
    for number, windows in enumerate(rounds):
        taken = np.zeros(num_ranks, np.int64)
        for window in windows.tolist():
            rank = int(np.argmin(np.where(taken < micro_batch_size, had, np.inf)))
            dealt[number, rank, taken[rank]] = window
            taken[rank] += 1
            had[rank] += work[window]
    dealt.sort(axis=-1)
    return dealt
