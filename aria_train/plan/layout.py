"""Parameters, the units they are sharded in, and what a rank holds of them; `parallel/shard.py` in numbers.

Dense parameters are cut along their rows over the ranks of a ZeRO group, experts first over the expert ranks and then
over the rest of the group. A rank's share is rounded up to whole rows, and so is what moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from aria_train.config import ModelConfig, Part, RunConfig
from aria_train.model import AriaModel
from aria_train.model.aria import part_of
from aria_train.parallel import shard
from aria_train.parallel.shard import is_expert_parameter


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> Part:
        return part_of(self.name)

    @property
    def is_expert(self) -> bool:
        return is_expert_parameter(self.name)

    @property
    def unit(self) -> str:
        """What it is gathered and reduced with, where there is enough of it: one all-gather and one reduce-scatter per
        step."""
        if self.is_expert:
            return self.name[: self.name.index(".experts.") + len(".experts")]
        block = re.match(r"(vision\.)?layers\.\d+(?=\.)", self.name)
        if block:
            return block[0]
        return "" if self.part == "decoder" else self.part


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of ranks."""

    world: int
    expert: int
    group: int
    """Ranks that shard optimizer state among them."""

    @classmethod
    def of(cls, config: RunConfig, world: int) -> Layout:
        return cls(world, config.parallel.expert_parallel_size, config.parallel.zero_group_size or world)

    @property
    def zero(self) -> int:
        """Ranks that share the state of one set of experts."""
        return self.group // self.expert

    @property
    def replicas(self) -> int:
        return self.world // self.group

    def ranks_of(self, parameter: Parameter) -> int:
        """Ranks that the parameter's state is sharded over, given its expert ranks."""
        return self.zero if parameter.is_expert else self.group

    def is_copied(self, parameter: Parameter, config: RunConfig) -> bool:
        """Whether a rank computes with another tensor than the master weight that it holds."""
        return self.ranks_of(parameter) * self.replicas > 1 or config.train.precision == "bf16"

    def whole(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape a rank computes with."""
        if parameter.is_expert:
            return (parameter.shape[0] // self.expert, *parameter.shape[1:])
        return parameter.shape

    def shard(self, parameter: Parameter) -> int:
        """Numbers in the largest share of a rank, which is what all of them move."""
        shape, ranks = self.whole(parameter), self.ranks_of(parameter)
        if parameter.is_expert and shape[0] % ranks and shape[1] % ranks == 0:
            return math.prod(shape) // ranks
        return -(-shape[0] // ranks) * math.prod(shape[1:])

    def gathered(self, parameter: Parameter) -> int:
        """Numbers in all shares together: the whole, and what fills up the last of them."""
        return self.shard(parameter) * self.ranks_of(parameter)


def parameters_of(model: ModelConfig) -> list[Parameter]:
    """Every parameter, by building the model without data."""
    with torch.device("meta"):
        return [Parameter(name, tuple(p.shape)) for name, p in AriaModel(model).named_parameters()]


def trained(parameters: Iterable[Parameter], config: RunConfig) -> list[Parameter]:
    """Those that the optimizer moves. (The encoder's final norm takes part in nothing.)"""
    return [p for p in parameters if p.part not in config.train.freeze and not p.name.startswith("vision.post_norm.")]


def units_of(parameters: Iterable[Parameter], layout: Layout) -> list[list[Parameter]]:
    """What is gathered and reduced together. What is too small to be a unit goes with what is around it."""
    units: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        units.setdefault(parameter.unit, []).append(parameter)
    experts = [name for name in units if name.endswith(".experts")]
    around = {name: name.removesuffix(".moe.experts") for name in experts if layout.expert == 1}
    blocks = {name for name in units if ".layers." in f".{name}"} | set(around.values())
    around |= {name: "vision" if name.startswith("vision.") else "" for name in sorted(blocks - set(experts))}
    for name, outer in {**around, "vision": "", "projector": ""}.items():
        if sum(p.numel for p in units.get(name, [])) < shard.SMALLEST_UNIT:
            units.setdefault(outer, []).extend(units.pop(name, []))
    return [unit for unit in units.values() if unit]


def activated(parameters: Iterable[Parameter], model: ModelConfig) -> int:
    """Parameters of the decoder that a token passes through, embedding and head not counted."""
    total = 0
    for parameter in parameters:
        if parameter.part == "decoder" and parameter.name not in ("embed.weight", "head.weight"):
            share = model.top_k / model.num_experts if parameter.is_expert else 1
            total += round(parameter.numel * share)
    return total
