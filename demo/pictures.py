"""Held-out loss of every source over the whole curriculum, as one picture."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aria_train.train.metrics import read_metrics
from demo.summary import STAGES, evaluations

_INK, _RULE = "#1f2933", "#e4e7eb"
_COLOURS = ("#2f6fa7", "#c8532d", "#4b8b5b", "#7a5ea8")
"""Of the stages."""
_COLUMNS = 4

Line = list[tuple[float, float]]
"""(million tokens since the first stage's first step, nats per token)"""


def save_source_losses(root: Path, path: Path) -> None:
    """A small panel per source, a line per stage."""
    panels = source_losses(root)
    rows = math.ceil(len(panels) / _COLUMNS)
    with matplotlib.rc_context({"font.size": 9, "text.color": _INK, "axes.edgecolor": _RULE, "axes.labelcolor": _INK}):
        figure = Figure(figsize=(11, 0.5 + 2.1 * rows), layout="constrained")
        for number, (source, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, _COLUMNS, number + 1)
            for stage, line in lines.items():
                axes.plot(*zip(*line), color=_COLOURS[STAGES.index(stage)], linewidth=1.6, marker="o", markersize=3)
            axes.set_title(source, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlim(0, _end(root))
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=_RULE, linewidth=0.8)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, colors=_INK)
        for number, stage in enumerate(STAGES):
            figure.axes[0].plot([], [], color=_COLOURS[number], label=stage)
        figure.legend(loc="outside upper right", ncols=len(STAGES), frameon=False)
        figure.supxlabel("million tokens", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, facecolor="white")


def source_losses(root: Path) -> dict[str, dict[str, Line]]:
    """Source -> stage -> its held-out losses; sources in the order in which the stages list them."""
    found: dict[str, dict[str, Line]] = {}
    for stage, first in zip(STAGES, _firsts(root)):
        for line in evaluations(root / stage):
            # A run with one source gives its loss no name.
            losses = {key.removeprefix("loss/"): line[key] for key in line if key.startswith("loss/")}
            for source, loss in (losses or {"text": line["loss"]}).items():
                point = ((first + line["tokens"]) / 1e6, loss)
                found.setdefault(source, {}).setdefault(stage, []).append(point)
    return found


def _firsts(root: Path) -> list[int]:
    """Tokens before each stage, and after the last."""
    totals = [read_metrics(root / stage / "metrics.jsonl")[-1]["tokens"] for stage in STAGES]
    return [0, *accumulate(totals)]


def _end(root: Path) -> float:
    return _firsts(root)[-1] / 1e6
