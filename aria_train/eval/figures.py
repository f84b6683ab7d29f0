"""Pictures of evaluations. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from aria_train.eval.answers import Answer
from aria_train.eval.experts import CAP, ExpertUse
from aria_train.eval.needle import NeedleResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _INK = "#bdbdbd", "#222222"
_RIGHT, _WRONG = "#1b7837", "#b2182b"


def draw_needles(path: Path, result: NeedleResult, title: str) -> None:
    """Lengths x depths; how many of a cell's needles are found as colour and, where there is room, as a number."""
    tables = {"teacher-forced": result.teacher_forced, "greedy": result.greedy}
    shown = {name: table for name, table in tables.items() if table is not None}
    grid = result.grid
    width = 1.6 + max(0.55 * len(grid.lengths), 2.2) * len(shown)
    figure = _figure(width, 1.9 + max(0.32 * len(grid.depths), 1.6))
    for index, (name, table) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), index + 1)
        columns = list(zip(*table, strict=True))  # depths as rows
        picture = axes.imshow(columns, cmap=_colours("viridis"), vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(grid.lengths)), [_tokens(length) for length in grid.lengths])
        axes.set_yticks(range(len(grid.depths)), [f"{100 * depth:.0f}%" for depth in grid.depths])
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("depth of the needle (0% = beginning)" if index == 0 else "")
        axes.set_title(f"{name}: {100 * _mean(table):.1f}% found", fontsize=9)
        if grid.trials > 1:
            _write_values(axes, columns)
    bar = figure.colorbar(picture, ax=figure.axes, fraction=0.05, pad=0.03)
    bar.set_label(f"needles found (of {grid.trials} per cell)" if grid.trials > 1 else "needle found (1) or not (0)")
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK)
    _save(figure, path)


def draw_experts(path: Path, use: ExpertUse, title: str) -> None:
    """Layers x experts for every source with images: red where images choose an expert more often than text does, blue
    where text does, white where both do alike, grey where there is nothing to compare."""
    from matplotlib.colors import LogNorm

    domains = use.domains()
    num_layers, num_experts = use.choices.shape[2:]
    figure = _figure(max(0.14 * num_experts, 4.5) + 1.6, 1.2 + (max(0.14 * num_layers, 1.0) + 0.75) * len(domains))
    for index, (name, source) in enumerate(domains):
        axes = figure.add_subplot(len(domains), 1, index + 1)
        ratio = use.ratio(source).clamp(min=1 / CAP).numpy()
        picture = axes.imshow(ratio, cmap=_colours("RdBu_r"), norm=LogNorm(1 / CAP, CAP), aspect="auto")
        text, visual = (use.tokens.sum(0) if source is None else use.tokens[source]).tolist()
        axes.set_title(f"{name}: {visual:,.0f} visual and {text:,.0f} text tokens", fontsize=9, loc="left")
        axes.set_ylabel("layer")
        axes.set_yticks(_ticks(num_layers))
        axes.set_xticks(_ticks(num_experts))
    figure.axes[-1].set_xlabel("routed expert")
    bar = figure.colorbar(picture, ax=figure.axes, fraction=0.04, pad=0.02, ticks=[1 / CAP, 0.1, 1, 10, CAP])
    bar.ax.set_yticklabels([f"≤ 1/{CAP:.0f}", "1/10", "1", "10", f"≥ {CAP:.0f}"])
    bar.set_label("share of visual tokens / share of text tokens\nthat choose the expert (grey: no such tokens)")
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK)
    _save(figure, path)


def draw_answers(path: Path, images: Sequence[bytes], answers: Sequence[Answer], title: str, columns: int = 8) -> None:
    """A contact sheet: images with what the model says of them, in red, with the right answer, where it is wrong."""
    rows = math.ceil(len(images) / columns)
    figure = _figure(1.25 * columns, 0.6 + 1.5 * rows)
    for index, (data, answer) in enumerate(zip(images, answers, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(Image.open(io.BytesIO(data)).convert("RGB"))
        axes.set_axis_off()
        if answer.right:
            axes.set_title(_short(answer.said), fontsize=9, color=_RIGHT)
        else:
            axes.set_title(f"{_short(answer.said)} (is {_short(answer.expected)})", fontsize=8, color=_WRONG)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without matplotlib's global state: safe beside whatever else draws."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=_GREY)


def _write_values(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(
                x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=_INK if value > 0.6 else "white"
            )


def _ticks(count: int) -> list[int]:
    """Every one of a few, every eighth of many."""
    return list(range(0, count, 1 if count <= 8 else 4 if count <= 32 else 8))


def _tokens(length: int) -> str:
    """65536 -> 64K, 1536 -> 1.5K, 500 -> 500."""
    return f"{length / 1024:g}K" if length % 512 == 0 and length >= 1024 else str(length)


def _mean(table: Sequence[Sequence[float]]) -> float:
    values = [value for row in table for value in row]
    return sum(values) / len(values)


def _short(text: str) -> str:
    """Fits over an image, in characters that the figure's font has; matplotlib would read dollars as formulas."""
    one_line = "".join(c if c.isprintable() and ord(c) < 0x250 else "·" for c in " ".join(text.split()))
    return (one_line if len(one_line) <= 14 else f"{one_line[:13]}…").replace("$", r"\$")
