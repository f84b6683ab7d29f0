"""What parallelism costs on this machine: two ranks of one thread beside one process of two, the same global batch.

The overhead is split into
    collectives   the rank that waits least stands still so long: transfer, and what it takes to start one
    copies        into and out of the buffers of all-gather and reduce-scatter
    imbalance     what the busiest rank computes beyond the mean
each as a share of the one process's step. What is left of the overhead is smaller matrices and two times the fixed
work of a step. Below 0 the ranks are faster: two threads do not share one process's many small operations.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from aria_train.config import load_config
from benchmarks.data import taking
from benchmarks.measure import compare
from benchmarks.table import Row

CONFIG = "configs/small/stage1_lang.yaml"
WIDTHS = (128, 256, 512)
"""Hidden sizes; heads and experts grow with them. The first is the demo's."""
WINDOWS = 8
"""Of a step of the demo, 256 tokens each."""
ZERO, EXPERTS, GROWING = "ZeRO 2", "EP 2", "ZeRO 2, tokens as width"
"""What ZeRO moves grows with the weights alone and what there is to compute with weights and tokens, so it has its rows
twice: with a step's tokens as they are, and in proportion to the width, as larger models are trained. What experts
exchange grows with tokens and width."""


def rows(turns: int) -> list[Row]:
    """A row per layout and width."""
    found = []
    for width in WIDTHS:
        for layout in (ZERO, EXPERTS, GROWING) if width > WIDTHS[0] else (ZERO, EXPERTS):
            expert_parallel = 2 if layout == EXPERTS else 1
            windows = WINDOWS * width // WIDTHS[0] if layout == GROWING else WINDOWS
            with Side(width, 1, 1, windows) as alone, Side(width, 2, expert_parallel, windows) as together:
                comparison = compare(together.step, alone.step, turns)
                split = together.split(comparison.seconds[1])
                shape = f"fp32, hidden {width}, {256 * windows:,} tokens: {split}"
            found.append(Row(f"2 ranks, {layout}", "1 process, 2 threads", comparison, shape))
            print(f"  {layout}, {shape}: {comparison.ratio:.2f}x", flush=True)
    return found


@dataclass(frozen=True)
class _Step:
    wall: float
    busy: float
    """Seconds that the main thread ran."""
    copies: float
    """Seconds of them that went into copies."""


@dataclass
class Side:
    """Processes that take a step of the same run when told to, and sleep between."""

    width: int
    ranks: int
    expert_parallel: int
    windows: int
    steps: list[list[_Step]] = field(default_factory=list)
    """[steps][ranks]"""

    def __enter__(self) -> Side:
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.ranks, port, os.cpu_count() or 1, self._overrides())
            self._processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def step(self) -> None:
        for pipe in self._pipes:
            pipe.send(True)
        self.steps.append([_Step(*pipe.recv()) for pipe in self._pipes])

    def split(self, alone: float) -> str:
        """Medians over the steps, as shares of `alone` seconds."""
        waits = statistics.median(min(rank.wall - rank.busy for rank in ranks) for ranks in self.steps)
        busy = [[rank.busy for rank in ranks] for ranks in self.steps]
        imbalance = statistics.median(max(ranks) - statistics.fmean(ranks) for ranks in busy)
        copies = statistics.median(max(rank.copies for rank in ranks) for ranks in self.steps)
        parts = {"collectives": waits, "copies": copies, "imbalance": imbalance}
        return ", ".join(f"{name} {seconds / alone:.0%}" for name, seconds in parts.items())

    def _overrides(self) -> list[str]:
        scale = self.width // WIDTHS[0]
        return [
            f"model.hidden_size={self.width}",
            f"model.num_heads={2 * scale}",
            f"model.num_kv_heads={2 * scale}",
            f"model.expert_size={96 * scale}",
            f"parallel.expert_parallel_size={self.expert_parallel}",
            f"train.global_batch_size={self.windows}",
            f"train.micro_batch_size={self.windows // self.ranks}",
            f"train.run_dir={self._folder.name}/run",
            "data.workers=1",
        ]


def _work(pipe: Connection, rank: int, ranks: int, port: int, cores: int, overrides: list[str]) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(max(1, cores // ranks))
    step = taking(load_config(CONFIG, overrides))
    for _ in range(8):  # until no memory comes from the system any more
        step()
    copies = _Copies()
    pipe.send(True)
    while pipe.recv():
        wall, busy, copied = time.perf_counter(), time.thread_time(), copies.seconds
        step()
        pipe.send((time.perf_counter() - wall, time.thread_time() - busy, copies.seconds - copied))


class _Copies:
    """Seconds that copies of parameters and gradients take. Timed where FSDP2 calls them: under a profiler, which keeps
    memory of its own between, they take several times as long."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_gather_copy_in", "split_with_sizes_copy", "chunk_cat"):
            setattr(torch.ops.fsdp, name, functools.partial(self._run, getattr(torch.ops.fsdp, name)))

    def _run(self, operator: Callable[..., object], *arguments: object, **options: object) -> object:
        began = time.perf_counter()
        result = operator(*arguments, **options)
        self.seconds += time.perf_counter() - began
        return result


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
