"""How a step's time and memory grow with tokens per window, experts, images, ranks, and GPUs; a picture each.

    python -m benchmarks.growth [tokens experts images ranks gpus] [--threads 2] [--minutes 9]

Writes docs/images/growth_*.svg and a table into docs/performance.md. The exponent is the slope over the upper half of
the range: 1 is in proportion, 2 is with the square. Points that the minutes do not suffice for are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig, load_config
from aria_train.model import AriaModel
from aria_train.model.vision import images_to_batch
from aria_train.plan.advice import step_seconds
from aria_train.plan.communication import communication
from aria_train.plan.layout import Layout, parameters_of
from aria_train.plan.memory import memory
from aria_train.plan.trace import trace
from benchmarks.measure import Cost, Run, cost_of
from benchmarks.page import fill

PICTURES = Path("docs/images")
PAGE = Path("docs/performance.md")
SMALL = "configs/small/stage2_mm.yaml"
GPU_FLOPS = 400e12
"""What one GPU is taken to reach in computation, in bf16."""


@dataclass(frozen=True)
class Point:
    x: int
    cost: Cost


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)} (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=9, help="after which no point is begun (default: 9)")
    arguments = parser.parse_args()
    if unknown := set(arguments.sweeps) - set(SWEEPS):
        parser.error(f"no sweep {', '.join(sorted(unknown))}: there are {', '.join(SWEEPS)}")
    deadline, load = time.monotonic() + arguments.minutes * 60, os.getloadavg()[0]
    found = {}
    for name in arguments.sweeps or SWEEPS:
        print(f"{name}:", flush=True)
        found[name] = points = SWEEPS[name](arguments.threads, deadline)
        if len(points) < 2:
            print("  too few points for a picture: give more --minutes", flush=True)
            continue
        draw(name, points, PICTURES / f"growth_{name}.svg")
        print(
            f"  exponents: time {exponent(points, 'seconds'):.2f}, memory {exponent(points, 'bytes'):.2f}", flush=True
        )
    if not arguments.sweeps:
        write_page({name: points for name, points in found.items() if len(points) > 1}, arguments.threads, load)


def sweep(values: list[int], threads: int, deadline: float, build: Callable[[int], Run]) -> list[Point]:
    """Each in a process of its own, while the time suffices for the next even if it grows with the square."""
    points: list[Point] = []
    took = 0.0
    for before, value in zip([values[0], *values], values, strict=False):
        began = time.monotonic()
        if began + took * (value / before) ** 2 > deadline:
            print(f"  {value:>7,}  left out: there is no time for it", flush=True)
            break
        points.append(Point(value, cost_of(build, value, threads=threads)))
        took = time.monotonic() - began
        print(f"  {value:>7,}  {points[-1].cost}", flush=True)
    return points


def write_page(found: dict[str, list[Point]], threads: int, load: float) -> None:
    """Puts the exponents and the pictures into their place in the documentation."""
    lines = ["| with | from | to | time | memory |", "| --- | --- | --- | --- | --- |"]
    for name, points in found.items():
        ends = f"{short(points[0].x)} | {short(points[-1].x)}"
        lines.append(
            f"| {LABELS[name]} | {ends} | {exponent(points, 'seconds'):.2f} | {exponent(points, 'bytes'):.2f} |"
        )
    pictures = "\n".join(f"![{LABELS[name]}](images/growth_{name}.svg)" for name in found)
    on = f"{os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, {load:.1f} other processes at work."
    fill(PAGE, "growth", "\n\n".join([on, "\n".join(lines), pictures]))


# ---------------------------------------------------------------------------------------------------------------------
# What is swept: forward, backward and AdamW of the small model


def with_tokens(tokens: int) -> Run:
    """One document of that many tokens."""
    return step_of(small(), text(tokens, 1))


def with_experts(experts: int) -> Run:
    """As many tokens and as many of them per expert's choice: what grows is the number of experts alone."""
    return step_of(small(num_experts=experts), text(4096, 16))


def with_images(images: int) -> Run:
    """4096 tokens, of which each image of 112 x 112 pixels takes 16."""
    config = load_config(SMALL).model
    assert config.vision is not None
    batch = text(4096, 16)
    for index in range(images):
        start = index * (4096 // max(1, images))
        batch.token_ids[start : start + 16] = config.image_token_id
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 112, 112, generator=generator) for _ in range(images)]
    batch.images = images_to_batch(pictures, config.vision)
    return step_of(config, batch)


def small(**changed: int) -> ModelConfig:
    config = load_config("configs/small/stage1_lang.yaml").model
    return ModelConfig.model_validate({**config.model_dump(), "max_positions": 65536, **changed})


def text(tokens: int, documents: int) -> MicroBatch:
    ids = torch.randint(10, 1024, (tokens,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(0, tokens + 1, tokens // documents, dtype=torch.int32)
    return MicroBatch(ids, ids.roll(-1), starts, tokens // documents, torch.zeros(documents, dtype=torch.int64))


def step_of(config: ModelConfig, batch: MicroBatch) -> Run:
    model = AriaModel(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def run() -> None:
        output = model(batch)
        (output.loss_sum / batch.num_targets + output.router.prob_sums.sum() * 1e-6).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def over_ranks(threads: int, deadline: float) -> list[Point]:
    """Steps of stage 1 of configs/small under the launcher: the same global batch, expert parallelism over all ranks.
    The cores are shared out, so a flat line would be communication that costs nothing."""
    points: list[Point] = []
    took = 0.0
    for ranks in (1, 2, 4):
        began = time.monotonic()
        if began + 2 * took > deadline:
            print(f"  {ranks:>7,}  left out: there is no time for it", flush=True)
            break
        with tempfile.TemporaryDirectory() as folder:
            launcher = ["-m", "aria_train.elastic", "--standalone", f"--nproc-per-node={ranks}", "-m", "aria_train"]
            overrides = [
                f"train.run_dir={folder}/run", f"parallel.expert_parallel_size={ranks}", "train.max_steps=14",
                "train.micro_batch_size=2", "data.validation=[]", "train.eval_interval_steps=0",
                "checkpoint.interval_steps=0",
            ]  # fmt: skip
            command = [sys.executable, *launcher, "train", "configs/small/stage1_lang.yaml", *overrides]
            subprocess.run(command, check=True, capture_output=True)
            steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        seconds = statistics.median(step["step_seconds"] for step in steps[4:])
        took = time.monotonic() - began
        points.append(Point(ranks, Cost(seconds, int(steps[-1]["memory_gib"] * 2**30))))
        print(f"  {ranks:>7,}  {points[-1].cost}", flush=True)
    return points


def over_gpus(_threads: int, _deadline: float) -> list[Point]:
    """The first stage of the whole model on as many GPUs as this machine has not: calculated, not measured."""
    config = load_config("configs/stage1_lang.yaml")
    parameters, activations = parameters_of(config.model), trace(config, config.parallel.expert_parallel_size)
    points = []
    for gpus in (2**power for power in range(4, 11)):
        layout = Layout.of(config, gpus)
        seconds = step_seconds(config, layout, communication(config, parameters, layout), GPU_FLOPS)
        points.append(Point(gpus, Cost(seconds, memory(config, parameters, layout, activations).on_gpu())))
        print(f"  {gpus:>7,}  {points[-1].cost}", flush=True)
    return points


SWEEPS: dict[str, Callable[[int, float], list[Point]]] = {
    "experts": lambda threads, deadline: sweep([8, 16, 32, 64, 128], threads, deadline, with_experts),
    "images": lambda threads, deadline: sweep([4, 8, 16, 32, 64, 128], threads, deadline, with_images),
    "tokens": lambda threads, deadline: sweep([2**p for p in range(10, 17)], threads, deadline, with_tokens),
    "ranks": over_ranks,
    "gpus": over_gpus,
}
LABELS = {
    "tokens": "tokens in the window, one document",
    "experts": "experts, two of them per token",
    "images": "images among 4,096 tokens",
    "ranks": "ranks on this machine, experts spread over all",
    "gpus": "GPUs for stage 1 of Aria (calculated)",
}


# ---------------------------------------------------------------------------------------------------------------------


def exponent(points: list[Point], field: str) -> float:
    """Slope of log cost over log x, upper half of the range."""
    upper = points[len(points) // 2 - (len(points) < 4) :]
    logs = np.log([[point.x, getattr(point.cost, field)] for point in upper])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def draw(name: str, points: list[Point], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    columns = (("seconds", "seconds per step", 1.0), ("bytes", "peak memory, MiB", 2**20))
    for axes, (field, label, unit) in zip(figure.subplots(1, 2), columns, strict=True):
        values = [getattr(point.cost, field) / unit for point in points]
        axes.plot([point.x for point in points], values, "o-", color="#3b6ea5")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([point.x for point in points], [short(point.x) for point in points])
        ticks = [
            2.0**power for power in range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)
        ]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(LABELS[name])
        axes.set_ylabel(label)
        axes.set_title(f"exponent {exponent(points, field):.2f}", fontsize=10)
        axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def short(value: int) -> str:
    return f"{value // 1024}K" if value >= 1024 else str(value)


if __name__ == "__main__":
    main()
