"""The plan as text or JSON."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from aria_train.config import RunConfig, check_world
from aria_train.plan.advice import Suggestion, suggest
from aria_train.plan.communication import Collective, communication
from aria_train.plan.layout import Layout, Parameter, activated, parameters_of
from aria_train.plan.memory import GIB, Memory, memory
from aria_train.plan.speed import Speed, speed
from aria_train.plan.trace import trace
from aria_train.train.console import format_count

_SUGGESTIONS = 5
_PARTS = {
    "master_weights": "weights, float32 shards",
    "computing_weights": "weights, whole, to compute with",
    "gradients": "gradients, float32",
    "reducing": "gradients on their way",
    "optimizer": "optimizer: both moments",
    "activations": "activations kept",
    "head": "output head and loss",
    "working": "backward pass at work",
}


@dataclass
class Plan:
    config: RunConfig
    layout: Layout
    parameters: list[Parameter]
    memory: Memory
    collectives: list[Collective]
    speed: Speed
    gpu: str
    gpu_gib: float
    utilisation: float
    suggestions: list[Suggestion]

    @property
    def fits(self) -> bool:
        return self.memory.on_gpu() <= self.gpu_gib * GIB

    @property
    def host_bytes(self) -> int:
        """What a rank keeps page-locked in host memory: the copy of its state that saves beside the training write."""
        return self.memory.state if self.config.checkpoint.asynchronous else 0

    @property
    def ranks_per_node(self) -> int:
        return min(self.config.launch.ranks_per_node, self.layout.world)


def make_plan(
    config: RunConfig, world: int, gpu: str, gpu_gib: float, peak_tflops: float, utilisation: float, images: int = 0
) -> Plan:
    """Raises ConfigError where the configuration cannot be laid out on so many ranks."""
    check_world(config, world)
    layout, parameters = Layout.of(config, world), parameters_of(config.model)
    traced = functools.partial(trace, num_images=images)
    rate = peak_tflops * 1e12 * utilisation
    return Plan(
        config,
        layout,
        parameters,
        memory(config, parameters, layout, traced(config, layout.expert)),
        communication(config, parameters, layout),
        speed(config, world, peak_tflops, utilisation),
        gpu,
        gpu_gib,
        utilisation,
        suggest(config, parameters, world, gpu_gib * GIB, rate, traced),
    )


def as_json(plan: Plan) -> str:
    """One line."""
    return json.dumps(
        {
            "stage": plan.config.stage,
            "gpus": plan.layout.world,
            "parameters": _counts(plan),
            "memory_bytes": plan.memory.parts() | {"peak": plan.memory.peak, "on_gpu": plan.memory.on_gpu()},
            "fits": plan.fits,
            "host_bytes": plan.host_bytes,
            "communication": [asdict(c) | {"wire": c.wire} for c in plan.collectives],
            "speed": asdict(plan.speed),
            "suggestions": [
                {"overrides": s.overrides(), "on_gpu": s.memory.on_gpu(), "seconds": s.seconds}
                for s in plan.suggestions[:_SUGGESTIONS]
            ],
        }
    )


def as_text(plan: Plan) -> str:
    """Some screens' worth of lines."""
    blocks = (_head(plan), _memory(plan), _communication(plan), _speed(plan), _suggestions(plan))
    return "\n\n".join("\n".join(block) for block in blocks)


def _counts(plan: Plan) -> dict[str, int]:
    counts: dict[str, int] = {"total": sum(p.numel for p in plan.parameters)}
    for parameter in plan.parameters:
        counts[parameter.part] = counts.get(parameter.part, 0) + parameter.numel
    body = activated(plan.parameters, plan.config.model)
    head = sum(p.numel for p in plan.parameters if p.name == "head.weight")
    return counts | {"activated_body": body, "activated": body + head}


def _head(plan: Plan) -> list[str]:
    config, layout, counts = plan.config, plan.layout, _counts(plan)
    micro_batches = config.train.global_batch_size // (layout.world * config.train.micro_batch_size)
    parts = ", ".join(f"{part} {counts[part]:,}" for part in ("decoder", "vision", "projector") if part in counts)
    return [
        f"{config.stage} on {layout.world:,} GPUs",
        f"  parameters   {counts['total']:,} ({parts})",
        f"  activated    {counts['activated_body']:,} per token, and {counts['activated']:,} with the output head",
        f"  ranks        {layout.world:,} = {layout.replicas} replica(s) x {layout.zero} ZeRO x {layout.expert} expert",
        f"  a step       {micro_batches} micro-batch(es) per rank of {config.train.micro_batch_size} window(s) of "
        f"{config.train.context_length:,} tokens; recompute {config.train.recompute}, {config.train.precision}",
    ]


def _memory(plan: Plan) -> list[str]:
    held = plan.memory
    lines = ["memory of the rank that holds most, GiB"]
    lines += [f"  {_PARTS[name]:<32} {size / GIB:>9.2f}" for name, size in held.parts().items()]
    lines += [
        f"  {'most at once':<32} {held.peak / GIB:>9.2f}",
        f"  {'with allocator, CUDA and NCCL':<32} {held.on_gpu() / GIB:>9.2f}   of {plan.gpu_gib:.1f} ({plan.gpu}): "
        + ("fits" if plan.fits else "does not fit"),
        f"  {'host memory, copies to save from':<32} {plan.host_bytes / GIB:>9.2f}   and "
        f"{plan.host_bytes * plan.ranks_per_node / GIB:.1f} on a node of {plan.ranks_per_node} (page-locked)",
    ]
    return lines


def _communication(plan: Plan) -> list[str]:
    lines = ["communication per step and GPU"]
    if not plan.collectives:
        return [*lines, "  none: one rank"]
    lines.append(f"  {'':<40} {'':<15} {'ranks':>6} {'calls':>8} {'bytes given':>18} {'GB on the wire':>15}")
    for c in plan.collectives:
        lines.append(f"  {c.what:<40} {c.kind:<15} {c.ranks:>6} {c.calls:>8,} {c.given:>18,} {c.wire / 1e9:>15.3f}")
    return lines


def _speed(plan: Plan) -> list[str]:
    s, config = plan.speed, plan.config
    tokens = config.total_steps * config.tokens_per_step
    return [
        f"speed at {plan.utilisation:.0%} of the {plan.gpu}'s peak",
        f"  {s.flops_per_token / 1e9:.1f} GFLOP per token, {format_count(s.tokens_per_second)} tokens/s, "
        f"{s.seconds_per_step:.2f} s per step",
        f"  {format_count(tokens)} tokens in {config.total_steps:,} steps: {s.days:.2f} days",
    ]


def _suggestions(plan: Plan) -> list[str]:
    if not plan.suggestions:
        return [f"No layout of {plan.layout.world} rank(s) fits: use more of them, or a shorter train.context_length."]
    lines = ["layouts that fit, likely fastest first (estimates, to compare them with each other)"]
    for s in plan.suggestions[:_SUGGESTIONS]:
        lines.append(f"  {s.memory.on_gpu() / GIB:>6.1f} GiB {s.seconds:>8.2f} s/step   {' '.join(s.overrides())}")
    return lines
