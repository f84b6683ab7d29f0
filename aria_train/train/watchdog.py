"""Hangs: when no step ends for too long, every rank says where it is, and the job ends so that it can start again.

Each rank watches itself, since a rank that hangs in a collective makes all others hang in the next. What they say goes
to `logs/hangs/` of the run directory, a file per rank; the first rank that could speak names those that could not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from aria_train.errors import EXIT_RESTART

_GRACE = 5.0
"""Seconds that ranks wait for each other's reports; they all stand still since the same step."""


class Watchdog:
    """Ends the process when `beat` has not been called for `seconds` (0: never), between `start` and `stop`."""

    def __init__(self, seconds: float, rank: int, world_size: int, folder: Path) -> None:
        self._seconds, self._rank, self._world_size, self._folder = seconds, rank, world_size, folder
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._step, self._doing, self._last = 0, "starting", time.monotonic()

    def start(self, step: int) -> None:
        self.beat(step, "training")
        if self._seconds > 0:
            self._main = threading.get_ident()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

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
        try:
            own = self._report()
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{own['name']}.txt").write_text(own["text"], encoding="utf-8")
            time.sleep(_GRACE)
            spoke = [r for r in range(self._world_size) if (self._folder / f"{self._name(r)}.txt").exists()]
            if not spoke or spoke[0] == self._rank:
                print(self._summary(own, spoke), file=sys.stderr, flush=True)
        except Exception:  # A full disk, say. The report is lost, the job must still end.
            traceback.print_exc()
        os._exit(EXIT_RESTART)

    def _name(self, rank: int) -> str:
        return f"step_{self._step:08d}_rank_{rank:05d}"

    def _report(self) -> dict[str, str]:
        where = (
            f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()}): {self._doing} after step "
            f"{self._step}; nothing has ended for {time.monotonic() - self._last:.0f} s"
        )
        text = f"{where}\nlast collective: {last_collective()}\n\n{_stacks(self._main)}"
        return {"name": self._name(self._rank), "text": text}

    def _summary(self, own: dict[str, str], spoke: list[int]) -> str:
        lines = [f"aria-train: hang: no step has ended for {self._seconds:.0f} s. Reports are in {self._folder}:"]
        lines += [(self._folder / f"{self._name(rank)}.txt").read_text(encoding="utf-8") for rank in spoke[:16]]
        silent = sorted(set(range(self._world_size)) - set(spoke))
        if silent:
            shown = ", ".join(map(str, silent[:16])) + (", ..." if len(silent) > 16 else "")
            lines.append(f"Without a report, so dead or frozen: rank {shown}.")
        lines.append(f"The job ends with status {EXIT_RESTART}; started again, it goes on from the last checkpoint.")
        return "\n".join(lines)


def last_collective() -> str:
    """The newest entry of PyTorch's flight recorder, such as `gloo:all_reduce #57 of group dense, not complete`."""
    recorder: Any = torch._C._distributed_c10d
    try:
        trace = json.loads(recorder._dump_fr_trace_json(True, False))
        entries: list[dict[str, Any]] = trace["entries"]
    except (AttributeError, RuntimeError, ValueError, KeyError):
        return "unknown (this PyTorch has no flight recorder)"
    if not entries:
        return "none yet"
    entry = max(entries, key=lambda e: e["record_id"])
    state = "complete" if entry["retired"] else "not complete"
    group = entry["process_group"][-1]
    sizes = f"{entry['input_sizes']} -> {entry['output_sizes']}"
    return f"{entry['profiling_name']} #{entry['collective_seq_id']} of group {group}, {sizes}, {state}"


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
