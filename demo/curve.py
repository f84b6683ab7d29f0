"""The loss curve of a run: as a picture, and in the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.text import Text

from aria_train.train.metrics import read_metrics

INK, HELD_OUT, TRAINING, REFERENCE = "#1f2933", "#c2410c", "#94b8d8", "#616e7c"


@dataclass
class Curve:
    """Losses in nats per token over millions of tokens, and constant losses to compare with."""

    training: list[tuple[float, float]]
    held_out: list[tuple[float, float]]
    references: dict[str, float]
    """Name -> loss."""

    @classmethod
    def read(cls, run_dir: Path, references: dict[str, float]) -> Curve:
        """From a run's `metrics.jsonl` and `evaluations.jsonl`."""
        files = (run_dir / "metrics.jsonl", run_dir / "evaluations.jsonl")
        training, held_out = ([(m["tokens"] / 1e6, m["loss"]) for m in read_metrics(file)] for file in files)
        return cls(training, held_out, references)


def save_picture(curve: Curve, title: str, path: Path) -> None:
    """Draws the curve into a PNG."""
    with matplotlib.rc_context({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*curve.training), color=TRAINING, linewidth=1)
        axes.plot(*zip(*curve.held_out), color=HELD_OUT, linewidth=2.2, marker="o", markersize=5, clip_on=False)
        end = curve.training[-1][0]
        labels = [(curve.held_out[-1][1], "held-out", HELD_OUT)]
        for name, loss in curve.references.items():
            axes.axhline(loss, color=REFERENCE, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
            labels.append((loss, name, REFERENCE))
        for loss, name, color in labels:
            axes.annotate(
                f"{name}  {loss:.2f}", (end, loss), (8, 0), textcoords="offset points", va="center", color=color
            )
        at = curve.training[len(curve.training) // 4]
        axes.annotate("training", at, (-6, -6), textcoords="offset points", ha="right", va="top", color="#5b8db8")
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=14)
        axes.set_xlabel("million tokens")
        axes.set_ylabel("cross-entropy, nats per token")
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, colors=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def terminal_chart(curve: Curve, title: str, width: int, height: int = 16) -> Text:
    """The curve in `width` x about `height` characters: lines of Braille dots, two by four in a character."""
    columns = max(20, width - 6 - 17)
    end, top = curve.training[-1][0], max(loss for _, loss in [*curve.training, *curve.held_out])
    dots: dict[tuple[int, int], int] = defaultdict(int)
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    labels: dict[int, tuple[str, str]] = {}

    def row_of(loss: float) -> int:
        return round((1 - loss / top) * (4 * height - 1)) // 4

    def label(name: str, loss: float, color: str) -> None:
        row = min((row for row in range(height) if row not in labels), key=lambda row: abs(row - row_of(loss)))
        labels[row] = (f"{name} {loss:.2f}", color)

    label("held-out", curve.held_out[-1][1], "dark_orange")
    for name, loss in curve.references.items():
        cells.update({(row_of(loss), column): ("╌", "bright_black") for column in range(columns)})
        label(name, loss, "bright_black")
    for points, color in ((curve.training, "blue"), (curve.held_out, "dark_orange")):
        for x, y in _line([(x / end * (2 * columns - 1), (1 - y / top) * (4 * height - 1)) for x, y in points]):
            at = (y // 4, x // 2)
            dots[at] |= _DOTS[y % 4][x % 2]
            cells[at] = (chr(0x2800 + dots[at]), color)

    chart = Text(f"\n{title}\n", style="bold")
    ticks = {row_of(loss): f"{loss:4d}" for loss in range(0, int(top) + 1, 1 + int(top) // 10)}
    for row in range(height):
        chart.append(f"{ticks.get(row, '    ')} │", style="not bold bright_black")
        for column in range(columns):
            symbol, color = cells.get((row, column), (" ", ""))
            chart.append(symbol, style=f"not bold {color}")
        text, color = labels.get(row, ("", ""))
        chart.append(f" {text}\n", style=f"not bold {color}")
    chart.append(f"     └{'─' * columns}\n", style="not bold bright_black")
    axis = f"{'0':<{columns // 2}}{end:>{columns - columns // 2}.2f}"
    return chart.append(f"      {axis} million tokens", style="not bold bright_black")


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the Braille character for each dot, by row and column within it."""


def _line(points: list[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """Dots along the straight lines between points."""
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0))))
        for step in range(steps + 1):
            yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
