"""`make faults`: does everything to a small run that can go wrong, and writes docs/reliability.md.

python -m faults.run [NAME ...]     only those scenarios; the page keeps what is known of the others
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import save_stall
from benchmarks.page import fill
from faults import scenarios
from faults.clock import clock_jumps
from faults.kills import killed_at_random
from faults.scenarios import STEPS, Bench

RESULTS = Path("faults/results.json")
PAGE = Path("docs/reliability.md")
STALL = "save_stall"
SCENARIOS = [*scenarios.SCENARIOS, clock_jumps, killed_at_random]


def main(names: list[str]) -> int:
    """Runs the scenarios; returns 1 if one of them found what must not be."""
    known = {scenario.__name__: scenario for scenario in SCENARIOS}
    if unknown := set(names) - {*known, STALL}:
        print(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join([*known, STALL])}", file=sys.stderr)
        return 2
    chosen = [name for name in (*known, STALL) if not names or name in names]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if set(chosen) - {STALL}:
            with contextlib.redirect_stdout(io.StringIO()):
                bench = Bench(Path(folder))
        for name in chosen:
            began = time.monotonic()
            try:
                result = save_stall.main([]) if name == STALL else asdict(known[name](bench))
            except AssertionError as error:
                failed = True
                print(f"{name} FAILED: {error!s:.3000}", flush=True)
                continue
            _keep(name, result)
            print(f"{name} ({time.monotonic() - began:.0f} s): {result.get('lost', '')}", flush=True)
    write_page(list(known))
    return int(failed)


def _keep(name: str, result: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    results[name] = result | {"machine": machine}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def write_page(order: list[str]) -> None:
    """Puts what is known into its place in the page."""
    results = json.loads(RESULTS.read_text())
    text = ["| fault | how injected | times tried | what was lost |", "|---|---|---:|---|"]
    for name in order:
        if row := results.get(name):
            text.append(f"| {row['fault']} | {row['injected']} | {row['tried']} | {row['lost']} |")
    machines = sorted({row["machine"] for row in results.values()})
    text += ["", f"A run here has {STEPS} steps on two ranks with expert parallelism, on {'; '.join(machines)}."]
    if stall := results.get(STALL):
        blocked, lost = ((stall[f"{w}_asynchronous"], stall[f"{w}_synchronous"]) for w in ("blocked", "lost"))
        text += [
            "",
            f"An asynchronous save of {stall['mebibytes']} MiB holds training up for {blocked[0]:.2f} s, a synchronous "
            f"one for {blocked[1]:.2f} s: {stall['blocked_ratio']:.1%} of it (`python -m benchmarks.save_stall`, "
            f"medians of {stall['rounds']} rounds in turns). Steps beside which the files are written share the "
            "machine's cores, memory and disk with the writing; with what that costs them, it is "
            f"{lost[0]:.2f} s against {lost[1]:.2f} s.",
        ]
    fill(PAGE, "what make faults found", "\n".join(text))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
