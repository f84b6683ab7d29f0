"""Where a step's time goes, by part of the model: `train.profile=3` looks at three steps, once two have warmed up.

In `profile/` of the run directory each rank writes a table, such as `rank0.txt`, and the first a trace for
chrome://tracing or Perfetto, `rank0.json`: traces are large, and those of all ranks would be written at once. On a GPU
the table counts the time of kernels, on a CPU that of operators.

Modules get a named range while they are watched. What autograd runs is counted where its forward operation was: both
carry the same sequence number.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from aria_train.model.decoder import Attention, RMSNorm
from aria_train.model.loss import LinearCrossEntropy
from aria_train.model.projector import Projector
from aria_train.model.vision import VisionEncoder
from aria_train.moe.experts import GroupedExperts, SharedExpert
from aria_train.moe.layer import MoELayer
from aria_train.moe.router import Router

WARM_UP = 2
"""Steps before the first that counts."""

_PARTS: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    RMSNorm: "norms",
    Attention: "attention",
    Router: "router",
    MoELayer: "dispatch",  # what its router and its experts leave
    GroupedExperts: "experts",
    SharedExpert: "shared expert",
    VisionEncoder: "vision encoder",
    Projector: "projector",
}
_OPERATORS = {LinearCrossEntropy.__name__: "head"}
"""Parts that are no module, by the operator that does their work."""
_RANGE = "part: "
_COLLECTIVES = re.compile(
    r"^(c10d::|_c10d_functional|aria_train::all_to_all|gloo:|nccl:|record_param_comms|FSDP::)|RegisterPostBackward"
)
"""What communicates, and the copies that FSDP makes around it."""
_BACKWARD = "autograd::engine::evaluate_function"
Parts = dict[tuple[int, int | None] | str, str | None]
"""The part in which a forward operation ran, by its sequence number and thread, and by its name."""


def part(name: str) -> record_function:
    """A range whose time the table gives under that name."""
    return record_function(_RANGE + name)


class Profile:
    """Watches `steps` steps of a run (0: none). `tell` is given a sentence when the files are there."""

    def __init__(self, steps: int, run_dir: Path, rank: int, model: nn.Module, tell: Callable[[str], None]) -> None:
        self._left, self._steps, self._warm_up = steps, steps, WARM_UP
        self._files, self._is_main = run_dir / "profile" / f"rank{rank}", rank == 0
        self._model, self._tell = model, tell
        self._profiler: profile | None = None
        self._hooks: list[Any] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step, from its data to its metrics."""
        if self._left and not self._warm_up and self._profiler is None:
            self._begin()
        with record_function("step"):
            yield
        self._warm_up = max(0, self._warm_up - 1)
        if self._profiler is not None:
            self._left -= 1
            if self._left == 0:
                self._end()

    def close(self) -> None:
        """What has been seen is written, also of a run that ends early."""
        if self._profiler is not None and self._left < self._steps:
            self._end()
        elif self._left:
            self._tell(f"train.profile: no step was watched: the run ended within its first {WARM_UP + 1}")

    def _begin(self) -> None:
        self._hooks = [hook for module in self._model.modules() for hook in _watch(module)]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _end(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        self._files.parent.mkdir(parents=True, exist_ok=True)
        trace = self._files.with_suffix(".json")
        if self._is_main:
            self._profiler.export_chrome_trace(str(trace))
        events = list(self._profiler.events() or [])
        self._files.with_suffix(".txt").write_text(table(events, self._steps - self._left), encoding="utf-8")
        self._profiler, self._left = None, 0
        self._tell(f"profile of {self._steps} step(s): {trace} and {trace.with_suffix('.txt').name}")


def table(events: list[FunctionEvent], steps: int) -> str:
    """Milliseconds per step by part of the model, forward and backward, and the operators that took most."""
    on_gpu = torch.cuda.is_available()
    # An operation bears the number that the next node of the graph will get, so of many with one number the last made
    # that node. Functions written in Python may lose the number on the way back: those are known by their name.
    parts: Parts = {}
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            parts[event.sequence_nr, event.thread] = parts[event.name] = _forward_part(event)
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name, backward = _place(event, parts)
        spent[name][backward] += seconds / 1e3 / steps
        operators[event.name][0] += seconds / 1e3 / steps
        operators[event.name][1] += 1 / steps
    total = sum(map(sum, spent.values())) or 1.0
    lines = [f"{'milliseconds per step':<24}{'forward':>10}{'backward':>10}{'together':>10}{'share':>8}"]
    for name, (ahead, back) in sorted(spent.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{name:<24}{ahead:>10.2f}{back:>10.2f}{ahead + back:>10.2f}{(ahead + back) / total:>8.1%}")
    lines += [f"{'all':<44}{total:>10.2f}", "", f"{'operator':<54}{'together':>10}{'calls':>8}"]
    for name, (milliseconds, calls) in sorted(operators.items(), key=lambda item: -item[1][0])[:30]:
        lines.append(f"{name[:52]:<54}{milliseconds:>10.2f}{calls:>8.0f}")
    return "\n".join(lines) + "\n"


def _watch(module: nn.Module) -> list[Any]:
    """Puts a range around the forward pass of a module that is a part."""
    name = next((name for kind, name in _PARTS.items() if isinstance(module, kind)), None)
    if name is None:
        return []
    entered: list[record_function] = []

    def enter(*_: Any) -> None:
        entered.append(part(name))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The event, and what it is in."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent


def _is_backward(event: FunctionEvent) -> bool:
    return any(outer.name.startswith(_BACKWARD) for outer in _ancestors(event))


def _forward_part(event: FunctionEvent) -> str | None:
    """The innermost part that the event is in, if it is in one."""
    for outer in _ancestors(event):
        if outer.name in _OPERATORS:
            return _OPERATORS[outer.name]
        if outer.name.startswith(_RANGE):
            return outer.name.removeprefix(_RANGE)
    return None


def _place(event: FunctionEvent, parts: Parts) -> tuple[str, bool]:
    """The part of the model that an event belongs to, and whether it is of the backward pass."""
    outer = list(_ancestors(event))
    backward = next((at for at in outer if at.name.startswith(_BACKWARD)), None)
    if any(_COLLECTIVES.search(at.name) for at in outer):
        return "collectives", backward is not None
    if (name := _forward_part(event)) is not None:
        return name, backward is not None
    if backward is None:
        return "other", False
    if backward.name.endswith("AccumulateGrad"):
        return "gradients added up", True
    name = parts.get((backward.sequence_nr, backward.fwd_thread)) or parts.get(_function(backward))
    return name or "other", True


def _function(backward: FunctionEvent) -> str:
    """`autograd::engine::evaluate_function: _RMSNormBackward` -> `_RMSNorm`."""
    return backward.name.removeprefix(_BACKWARD).removeprefix(": ").removesuffix("Backward")
