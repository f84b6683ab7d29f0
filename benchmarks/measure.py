"""How things are timed here: side by side in one run, in turns, many times; ratios of neighbours, medians, spread.

A machine's speed drifts by more than what is to be measured, so a figure from one run says nothing beside one from
another. What runs in turns sees the same machine.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from aria_train.kernels import multiplies_bf16

Run = Callable[[], object]
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """One side against another, measured in turns."""

    ours: list[float]
    """Seconds of each turn."""
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over turns."""
        return statistics.median(self._ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio over turns."""
        low, _, high = statistics.quantiles(self._ratios, n=4)
        return low, high

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians: ours, theirs."""
        return statistics.median(self.ours), statistics.median(self.theirs)

    @property
    def _ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def compare(ours: Run, theirs: Run, turns: int, warmup: int = 1) -> Comparison:
    """Times two things in turns, whose order alternates."""
    for _ in range(warmup):
        ours()
        theirs()
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                times[side].append(seconds_of(theirs if side else ours))
    finally:
        gc.enable()
    return Comparison(*times)


@contextlib.contextmanager
def in_own_process(build: Callable[..., Run], *arguments: Any, threads: int) -> Iterator[Run]:
    """What `build(*arguments)` returns there, to be run from here, with what it returns: neither side then finds memory
    that the other has just freed, nor has its process set up as the other's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_when_told, args=(theirs, threads, build, arguments), daemon=True)
    process.start()
    theirs.close()

    def run() -> object:
        ours.send(True)
        return ours.recv()

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _run_when_told(pipe: Any, threads: int, build: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    run = build(*arguments)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(run())


def seconds_of(run: Run) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def gemm_ceiling(dtype: torch.dtype, size: int = 2048, turns: int = 7, device: torch.device = CPU) -> float:
    """FLOP/s of one large square matrix product, the most this device was seen to do: the best of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b)) for _ in range(turns))


def gemm_ceilings() -> dict[str, float]:
    """Of each precision that the machine has instructions for."""
    return {name: gemm_ceiling(DTYPES[name]) for name in precisions()}


def precisions() -> list[str]:
    """Those that the machine has instructions for; without them a step would take minutes."""
    if multiplies_bf16():
        return list(DTYPES)
    print("bf16 is left out: this CPU has no instructions for it", flush=True)
    return ["fp32"]


def forget(paths: Iterable[Path]) -> None:
    """Drops files from the page cache, so that they are read from the disk next."""
    for path in paths:
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


@dataclass(frozen=True)
class Cost:
    """Of one run, after one that warmed up; the median of some where they are short."""

    seconds: float
    bytes: int
    """That the process needed at the peak, beyond what its imports take."""

    def __str__(self) -> str:
        return f"{self.seconds:8.3f} s  {self.bytes / 2**20:8.0f} MiB"


def peak_memory(build: Callable[..., Run], *arguments: Any, threads: int) -> int:
    """Bytes that a process needs at most, beyond what its imports take, to build something and run it twice."""
    return cost_of(build, *arguments, threads=threads, enough=0.0).bytes


def cost_of(build: Callable[..., Run], *arguments: Any, threads: int, enough: float = 3.0) -> Cost:
    """`build(*arguments)` is called, and what it returns twice, or until it has run for `enough` seconds; in a process
    of its own."""
    with in_own_process(_measured, enough, build, arguments, threads=threads) as measure:
        return cast(Cost, measure())


def _measured(enough: float, build: Callable[..., Run], arguments: tuple[Any, ...]) -> Run:
    baseline = _status("VmRSS")
    run = build(*arguments)

    def measure() -> Cost:
        run()  # also for the memory: an optimizer's moments come with its first step
        times = [seconds_of(run)]
        while sum(times) < enough:
            times.append(seconds_of(run))
        return Cost(statistics.median(times), _status("VmHWM") - baseline)

    return measure


def _status(field: str) -> int:
    fields: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(fields[field].split()[0]) * 1024
