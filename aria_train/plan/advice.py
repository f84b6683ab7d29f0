"""Layouts that fit: expert ranks, ZeRO groups, micro-batch and recomputation, likely fastest first.

The order comes from a rough estimate, good for comparing layouts of one model on one kind of machine: computation at
the given utilisation, plus what recomputation repeats, plus collectives that nothing hides, over NVLink within a node
of eight and the network beyond, with some microseconds per hop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aria_train.config import RunConfig, check_world
from aria_train.errors import ConfigError
from aria_train.model.recompute import Recompute
from aria_train.plan.communication import Collective, communication
from aria_train.plan.layout import Layout, Parameter
from aria_train.plan.memory import Memory, memory
from aria_train.plan.speed import flops_per_token
from aria_train.plan.trace import Activations

_NODE = 8
_REPEATED: dict[Recompute, float] = {"none": 0.0, "selective": 0.03, "full": 0.33}
"""Share of the work of a step that recomputation adds."""
_NVLINK, _NETWORK = 350e9, 40e9
"""Bytes per second and GPU, one way, as collectives reach them."""
_HOP_SECONDS = 4e-6
_MICRO_BATCHES = (1, 2, 4, 8)
_MOST_EXPERT_RANKS = 64
_EASY = 0.92
"""Share of the GPU's memory that a layout may fill to be suggested."""


@dataclass
class Suggestion:
    expert_ranks: int
    zero_group: int | None
    micro_batch: int
    recompute: Recompute
    memory: Memory
    seconds: float
    """Estimated time of a step."""

    def overrides(self) -> list[str]:
        """As keys of the configuration."""
        group = "null" if self.zero_group is None else self.zero_group
        return [
            f"parallel.expert_parallel_size={self.expert_ranks}",
            f"parallel.zero_group_size={group}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.recompute={self.recompute}",
        ]


def suggest(
    config: RunConfig,
    parameters: list[Parameter],
    world: int,
    gpu_bytes: float,
    flops_per_second: float,
    trace: Callable[[RunConfig, int], Activations],
) -> list[Suggestion]:
    """Every layout that fits into `gpu_bytes`, likely fastest first. `trace` tells activations of (config, expert
    ranks); `flops_per_second` is what one GPU reaches in computation."""
    found = []
    for candidate in _candidates(config, world):
        layout = Layout.of(candidate, world)
        # What one window leaves behind, times the windows; any spread of experts leaves the same.
        single = _with(candidate, train={"micro_batch_size": 1})
        traced = trace(single, 1 if layout.expert == 1 else 2)
        windows = candidate.train.micro_batch_size
        grown = Activations(traced.kept * windows, traced.head, traced.working * windows)
        held = memory(candidate, parameters, layout, grown)
        if held.on_gpu() <= gpu_bytes * _EASY:
            seconds = step_seconds(candidate, layout, communication(candidate, parameters, layout), flops_per_second)
            parallel, train = candidate.parallel, candidate.train
            found.append(
                Suggestion(
                    parallel.expert_parallel_size, parallel.zero_group_size, windows, train.recompute, held, seconds
                )
            )
    return sorted(found, key=lambda s: (round(s.seconds, 4), s.memory.peak))


def _candidates(config: RunConfig, world: int) -> Iterator[RunConfig]:
    experts = config.model.num_experts
    degrees = [d for d in range(1, min(_MOST_EXPERT_RANKS, world) + 1) if experts % d == 0 and world % d == 0]
    groups = [None, *(_NODE * 2**k for k in range(1, 8) if _NODE * 2**k < world and world % (_NODE * 2**k) == 0)]
    for expert, group, micro, recompute in itertools.product(degrees, groups, _MICRO_BATCHES, _REPEATED):
        if group is not None and group % expert:
            continue
        candidate = _with(
            config,
            parallel={"expert_parallel_size": expert, "zero_group_size": group},
            train={"micro_batch_size": micro, "recompute": recompute},
        )
        try:
            check_world(candidate, world)
        except ConfigError:
            continue
        yield candidate


def _with(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The configuration with other values, not validated: those given are known to be right."""
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def step_seconds(config: RunConfig, layout: Layout, collectives: list[Collective], flops_per_second: float) -> float:
    """The estimate: computation, and collectives as if nothing ran beside them."""
    work = flops_per_token(config) * config.tokens_per_step / layout.world / flops_per_second
    return work * (1 + _REPEATED[config.train.recompute]) + sum(_exposed(c, layout) for c in collectives)


def _exposed(collective: Collective, layout: Layout) -> float:
    """Seconds of a step that the collective takes, were nothing to run beside it."""
    # Expert ranks are consecutive; all other groups reach over nodes as soon as there are several.
    within = collective.ranks if collective.kind == "all-to-all" else layout.world
    bandwidth = _NVLINK if within <= _NODE else _NETWORK
    hops = 1 if collective.kind == "all-to-all" else collective.ranks - 1
    return collective.wire / bandwidth + collective.calls * hops * _HOP_SECONDS
