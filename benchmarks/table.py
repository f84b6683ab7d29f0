"""What was measured, as rows: shown, written as JSON, and as a table for the documentation."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, Comparison
from benchmarks.page import fill_or_add

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/performance.md")
COLUMNS = ("what", "against", "ratio", "quartiles", "ours", "theirs", "of the GEMM ceiling", "memory", "shape")


@dataclass
class Row:
    what: str
    against: str
    comparison: Comparison
    shape: str
    share: float | None = None
    """Of the machine's matrix products at the same precision; ours."""
    memory: float | None = None
    """Ours over theirs, at the peak."""
    least_memory: float | None = None
    """What weights, gradients and an optimizer's moments take, over theirs."""

    def as_json(self) -> dict[str, Any]:
        ours, theirs = self.comparison.seconds
        return {
            "what": self.what,
            "against": self.against,
            "shape": self.shape,
            "ratio": self.comparison.ratio,
            "quartiles": list(self.comparison.spread),
            "seconds": ours,
            "their_seconds": theirs,
            "share_of_gemm_ceiling": self.share,
            "memory_ratio": self.memory,
            "least_memory_ratio": self.least_memory,
        }

    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        (ours, theirs), (low, high) = self.comparison.seconds, self.comparison.spread
        share = "" if self.share is None else f"{self.share:.0%}"
        memory = "" if self.memory is None else f"{self.memory:.2f}x"
        memory += "" if self.least_memory is None else f" ({self.least_memory:.2f}x)"
        ratio, spread = f"{self.comparison.ratio:.2f}x", f"{low:.2f} to {high:.2f}"
        return [self.what, self.against, ratio, spread, duration(ours), duration(theirs), share, memory, self.shape]


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What was measured on: the machine, and its GPU if that is the device."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    facts = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def place(facts: dict[str, Any]) -> str:
    """What the machine is called where its results stand."""
    device = re.sub(r"\((R|TM)\)| Processor", "", str(facts.get("gpu", facts["cpu"])))
    return device if "gpu" in facts else f"{device}, {facts['cores']} cores"


def results_of(facts: dict[str, Any]) -> Path:
    """The file of the machine's results."""
    return RESULTS / (re.sub(r"\W+", "-", place(facts).lower()) + ".json")


def in_words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())


def show(rows: list[Row]) -> None:
    table = Table(*COLUMNS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=200, highlight=False).print(table)


def write(rows: list[Row], facts: dict[str, Any], command: str, **more: Any) -> None:
    """As JSON, and as this machine's table of what the command measured, into the documentation."""
    path = results_of(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": facts, "rows": [row.as_json() for row in rows], **more}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = f"### {place(facts)}\n\n`{command}`: {in_words(facts)}.\n\n{markdown(rows)}"
    for name, figures in more.items():
        text += f"\n\n{name}:\n\n" + "\n".join(f"- {in_words(part)}" for part in figures)
    fill_or_add(PAGE, f"{command}: {place(facts)}", text)


def markdown(rows: list[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
