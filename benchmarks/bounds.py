"""What bounds a training step: where our time and transformers' goes, by kind of operator.

    python -m benchmarks.bounds [--steps 5] [--threads 2]

Matrix products and attention are PyTorch's and oneDNN's. "At best" is the ratio if everything else of ours took no time
at all. Writes this machine's table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import cast

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Run, in_own_process, precisions
from benchmarks.page import fill_or_add
from benchmarks.table import PAGE, in_words, machine, place
from benchmarks.training_step import TEXT, Shape, build_ours, build_theirs

KINDS = {
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|mkldnn_linear|_grouped_mm)$",
    "attention": r"^aten::_scaled_dot_product.*",
    "AdamW": r"_fused_adamw",
    "gather and scatter": r"^aten::(index|gather|scatter|embedding|sort|argsort|topk|bincount|repeat)",
    "copies": r"^aten::(copy_|cat|clone|contiguous|_to_copy|zero_|fill_)$",
}
REST = "elementwise and the rest"
LIBRARIES = ("matrix products", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bounds", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "| shape | ratio | at best | ms per step | " + " | ".join((*KINDS, REST)) + " |",
        "| --- " * (len(KINDS) + 5) + "|",
    ]
    print("\n".join(lines))
    measured = precisions()
    for shape in [shape for shape in TEXT if shape.precision in measured]:
        lines += compared(shape, arguments.steps)
        print("\n".join(lines[-2:]), flush=True)
    facts = machine()
    heading = f"### {place(facts)}: what bounds a step"
    text = "\n\n".join([heading, f"`python -m benchmarks.bounds`: {in_words(facts)}.", "\n".join(lines)])
    fill_or_add(PAGE, f"what bounds a step: {place(facts)}", text)


def compared(shape: Shape, steps: int) -> list[str]:
    """Milliseconds per step on both sides, whose profiled steps alternate; medians by kind."""
    threads = torch.get_num_threads()
    with (
        in_own_process(profiled, build_ours, shape, threads=threads) as ours,
        in_own_process(profiled, build_theirs, shape, threads=threads) as theirs,
    ):
        for _ in range(3):
            ours()
            theirs()
        turns = [cast("list[dict[str, float]]", [ours(), theirs()]) for _ in range(steps)]
    spent = [
        {kind: statistics.median(turn[side][kind] for turn in turns) for kind in (*KINDS, REST)} for side in (0, 1)
    ]
    left, right = (sum(kinds.values()) for kinds in spent)
    floor = sum(spent[0][kind] for kind in LIBRARIES)
    heads = (f"{shape} | {right / left:.2f}x | {right / floor:.2f}x | ours {left:.0f}", f" | | | theirs {right:.0f}")
    return [
        f"| {head} | " + " | ".join(f"{kinds[kind]:.0f} ({kinds[kind] / total:.0%})" for kind in (*KINDS, REST)) + " |"
        for head, kinds, total in zip(heads, spent, (left, right), strict=True)
    ]


def profiled(build: Callable[[Shape], Run], shape: Shape) -> Run:
    return functools.partial(by_kind, build(shape))


def by_kind(run: Run) -> dict[str, float]:
    """Milliseconds of one run; what is in no operator counts as the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        began = time.perf_counter()
        run()
        whole = (time.perf_counter() - began) * 1e3
    found: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), REST)
        found[kind] += event.self_cpu_time_total / 1e3
    found[REST] += whole - sum(found.values())
    return dict(found)


if __name__ == "__main__":
    main()
