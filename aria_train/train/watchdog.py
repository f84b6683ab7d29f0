"""Hangs: when no step ends for too long, every rank says where it is, and the job ends so that it can start again.

Each rank watches itself, since a rank that hangs in a collective makes all others hang in the next. What they say goes
to a folder in `logs/hangs/` of the run directory, a file per rank; the first rank that could speak names those that
could not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from aria_train.errors import EXIT_RESTART
from aria_train.parallel.collectives import broadcast_object

_GRACE = 5.0
"""Seconds that ranks wait for each other's reports; they all stand still since the same step."""


def folder_of_reports(run_dir: Path) -> Path:
    """Where the ranks will write, the same on all and another at every start: old reports would speak for the silent.
    Collective."""
    start = broadcast_object(lambda: f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}")
    return run_dir / "logs" / "hangs" / start


class Watchdog:
    """Ends the process when `beat` has not been called for `seconds` (0: never), between `start` and `stop`."""

    def __init__(self, seconds: float, rank: int, world_size: int, folder: Path) -> None:
        self._seconds, self._rank, self._world_size, self._folder = seconds, rank, world_size, folder
        self._main = threading.main_thread().ident
        self._stopped, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._step, self._doing, self._last = 0, "starting", time.monotonic()

    def start(self, step: int) -> None:
        self.beat(step, "training")
        if self._seconds > 0:
            self._main = threading.get_ident()
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._ending.is_set():
            # Another rank has left before this one, and its connections with it: the report and the status come first.
            self._thread.join()

    def beat(self, step: int, doing: str) -> None:
        """Something ended just now, and this comes next."""
        self._step, self._doing, self._last = step, doing, time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 10)):
            # Monotonic: the wall clock may jump.
            if time.monotonic() - self._last > self._seconds:
                self._end_job()

    def _end_job(self) -> None:
        """Reports, lets the others report, and leaves. Nothing here may wait for another rank."""
        self._ending.set()
        try:
            own = self._folder / f"rank_{self._rank:05d}.txt"
            self._folder.mkdir(parents=True, exist_ok=True)
            own.write_text(self._report(), encoding="utf-8")
            time.sleep(_GRACE)
            reports = sorted(self._folder.glob("rank_*.txt"))
            if reports[0] == own:
                print(self._summary(reports), file=sys.stderr, flush=True)
        except Exception:  # A full disk, say. The report is lost, the job must still end.
            traceback.print_exc()
        os._exit(EXIT_RESTART)

    def _report(self) -> str:
        where = (
            f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()}): {self._doing} after step "
            f"{self._step}; nothing has ended for {time.monotonic() - self._last:.0f} s"
        )
        return f"{where}\nlast collective: {last_collective()}\n\n{_stacks(self._main)}"

    def _summary(self, reports: list[Path]) -> str:
        lines = [f"aria-train: hang: no step has ended for {self._seconds:.0f} s. Reports are in {self._folder}:"]
        lines += [report.read_text(encoding="utf-8") for report in reports[:16]]
        silent = sorted(set(range(self._world_size)) - {int(report.stem.removeprefix("rank_")) for report in reports})
        if silent:
            shown = ", ".join(map(str, silent[:16])) + (", ..." if len(silent) > 16 else "")
            lines.append(f"Without a report, so dead or frozen: rank {shown}.")
        lines.append(f"The job ends with status {EXIT_RESTART}; started again, it goes on from the last checkpoint.")
        return "\n".join(lines)


def last_collective() -> str:
    """The newest entry of PyTorch's flight recorders, such as `gloo:all_reduce #57 of group dense, not complete`."""
    found = [_recorded(name) for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")]
    if all(entries is None for entries in found):
        return "unknown (this PyTorch has no flight recorder)"
    entry = max((e for entries in found for e in entries or ()), key=lambda e: e["time_created_ns"], default=None)
    if entry is None:
        return "none yet"
    state = "complete" if entry["retired"] else "not complete"
    group = entry["process_group"][-1]
    sizes = f"{entry['input_sizes']} -> {entry['output_sizes']}"
    return f"{entry['profiling_name']} #{entry['collective_seq_id']} of group {group}, {sizes}, {state}"


def _recorded(name: str) -> list[dict[str, Any]] | None:
    """What a flight recorder holds; None where there is none of that name. NCCL has one of its own."""
    recorders: Any = torch._C._distributed_c10d
    try:
        entries: list[dict[str, Any]] = json.loads(getattr(recorders, name)(True, False))["entries"]
    except (AttributeError, RuntimeError, ValueError, KeyError):
        return None
    return entries


def _stacks(main: int | None) -> str:
    """The Python stack of every thread, the training loop's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    parts = [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)
