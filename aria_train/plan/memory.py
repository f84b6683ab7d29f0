"""Bytes on the rank that holds most, by part, at the moment when most is held.

Weights lie there twice over a step: the float32 shard that the optimizer moves, and the whole in the type that is
computed in (one rank that computes in float32 has them once). Gradients are summed up whole over the micro-batches, in
float32; the last one's backward pass turns them into shards, unit by unit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from aria_train.config import RunConfig
from aria_train.plan.communication import bytes_per_weight
from aria_train.plan.layout import Layout, Parameter, trained, units_of
from aria_train.plan.trace import Activations

GIB = 2**30
RESERVE = 2 * GIB
"""What a GPU needs beside tensors: the CUDA context, NCCL's buffers, kernels' workspace."""
FRAGMENTATION = 0.04
"""Share of the tensors' bytes that the allocator holds on top."""
GPUS = {"a100-40": 39.4, "a100": 79.1, "h100": 79.1, "h200": 139.8, "b200": 178.4, "b300": 267.7}
"""GiB that PyTorch sees."""


@dataclass
class Memory:
    """Bytes."""

    master_weights: int
    """float32 shards."""
    computing_weights: int
    """Whole weights in the type computed in; held from the first forward pass to the last backward pass."""
    gradients: int
    """Summed up whole over micro-batches; with one micro-batch, shards."""
    reducing: int
    """The largest unit's gradients on their way: whole, and laid out for the reduce-scatter."""
    optimizer: int
    """Both moments."""
    activations: int
    """Kept for the backward pass."""
    head: int
    """Beyond that, while the head and the loss are computed."""
    working: int
    """Beyond that, in the backward pass."""

    @property
    def state(self) -> int:
        """What is there over the whole run."""
        return self.master_weights + self.optimizer

    @property
    def peak(self) -> int:
        """At the head of the last micro-batch, in its backward pass, or while the first gradients are on their way, by
        when the activations they came from are gone."""
        busy = max(self.head, self.working, self.reducing)
        return self.state + self.computing_weights + self.gradients + self.activations + busy

    def on_gpu(self) -> int:
        """With what the allocator and the GPU need on top."""
        return round(self.peak * (1 + FRAGMENTATION)) + RESERVE

    def parts(self) -> dict[str, int]:
        return asdict(self)


def memory(config: RunConfig, parameters: list[Parameter], layout: Layout, activations: Activations) -> Memory:
    """Of one rank under this layout."""
    moving = trained(parameters, config)
    micro_batches = config.train.global_batch_size // (layout.world * config.train.micro_batch_size)
    compute = bytes_per_weight(config)
    whole = sum(math.prod(layout.whole(p)) for p in moving)
    shards = sum(layout.shard(p) for p in moving)
    copied = [p for p in parameters if layout.is_copied(p, config)]
    units = units_of(trained(copied, config), layout)
    largest = max((sum(layout.gathered(p) for p in unit) for unit in units), default=0)
    return Memory(
        master_weights=4 * sum(layout.shard(p) for p in parameters),
        computing_weights=compute * sum(layout.gathered(p) for p in copied),
        gradients=4 * (whole if micro_batches > 1 else shards),
        reducing=(compute + 4) * largest,
        optimizer=8 * shards,
        activations=activations.kept,
        head=activations.head,
        working=activations.working,
    )
