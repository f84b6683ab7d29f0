"""Collectives of one optimizer step: who takes part, how often, how many bytes.

`given` counts what one rank puts into the calls, the largest share where ranks differ; `wire` what it sends if they run
as rings, which is what a link has to carry. Tokens go where the router sends them, so what a rank receives depends on
the data; what it sends does not, and over all ranks the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from aria_train.config import RunConfig
from aria_train.plan.layout import Layout, Parameter, trained, units_of

_COUNT_BYTES = 8
_FIGURE_BYTES = 8


@dataclass
class Collective:
    what: str
    kind: str
    """all-gather, reduce-scatter, all-reduce or all-to-all."""
    ranks: int
    """Ranks that take part in one call."""
    calls: int
    """Per rank and step."""
    given: int
    """Bytes per rank and step, over all calls."""

    @property
    def wire(self) -> float:
        """Bytes one rank sends per step."""
        others = self.ranks - 1
        factor = {"all-gather": others, "reduce-scatter": others / self.ranks, "all-to-all": others / self.ranks}
        return self.given * factor.get(self.kind, 2 * others / self.ranks)


def communication(config: RunConfig, parameters: list[Parameter], layout: Layout) -> list[Collective]:
    """Every collective of a step in which no evaluation and no save falls due."""
    found = _weights(config, parameters, layout)
    if layout.expert > 1:
        found += _tokens(config, layout)
    if layout.world > 1:
        found += _figures(config, layout)
    return [collective for collective in found if collective.calls]


def _weights(config: RunConfig, parameters: list[Parameter], layout: Layout) -> list[Collective]:
    compute = bytes_per_weight(config)
    moving = {p.name for p in trained(parameters, config)}
    found = []
    units = units_of(parameters, layout)
    for what, of_experts in (("experts", True), ("dense weights", False)):
        ranks = layout.zero if of_experts else layout.group
        gather = Collective(f"{what}: weights", "all-gather", ranks, 0, 0)
        scatter = Collective(f"{what}: gradients", "reduce-scatter", ranks, 0, 0)
        replicate = Collective(f"{what}: gradients over replicas", "all-reduce", layout.replicas, 0, 0)
        for unit in (u for u in units if all(p.is_expert for p in u) == of_experts):
            with_gradient = [p for p in unit if p.name in moving]
            if ranks > 1:
                gather.calls += 1
                gather.given += compute * sum(layout.shard(p) for p in unit)
            if ranks > 1 and with_gradient:
                scatter.calls += 1
                scatter.given += 4 * sum(layout.gathered(p) for p in with_gradient)
            if layout.replicas > 1 and with_gradient:
                replicate.calls += 1
                replicate.given += 4 * sum(layout.shard(p) for p in with_gradient)
        found += [gather, scatter, replicate]
    return found


def _tokens(config: RunConfig, layout: Layout) -> list[Collective]:
    """Tokens to their experts and back, forward and backward; before that, how many."""
    train, model = config.train, config.model
    micro_batches = train.global_batch_size // (layout.world * train.micro_batch_size)
    passes = micro_batches * model.num_layers
    tokens = train.micro_batch_size * train.context_length
    rows = tokens * model.top_k * model.hidden_size * bytes_per_weight(config)
    again = train.recompute == "full"  # in the backward pass the forward pass's: to the experts and back, and how many
    moves, counts = passes * (4 + 2 * again), passes * (1 + again)
    return [
        Collective("tokens", "all-to-all", layout.expert, moves, moves * rows),
        Collective("token counts", "all-to-all", layout.expert, counts, counts * model.num_experts * _COUNT_BYTES),
    ]


def _figures(config: RunConfig, layout: Layout) -> list[Collective]:
    """Targets, tokens and images of the batch; losses, routing statistics, the ranks' pulse; the gradient norm."""
    model, sources = config.model, max(1, len(config.data.train))
    statistics = 2 * sources + 2 * model.num_layers * (model.num_experts + 1)
    pulse = 2 + 2 * layout.world
    return [Collective("figures", "all-reduce", layout.world, 3, _FIGURE_BYTES * (3 + statistics + pulse + 1))]


def bytes_per_weight(config: RunConfig) -> int:
    """Of the type that is computed in."""
    return 2 if config.train.precision == "bf16" else 4
