"""The timeline of a curriculum as one picture: loss, learning rate, context, RoPE base and mixture over tokens.

Stages differ by orders of magnitude in tokens. Each gets its share of the width, but never less than a tenth, and the
axis is linear within a stage.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from aria_train.stages.plan import mixture, rope_text, short, short_power
from aria_train.stages.timeline import Track

_NARROWEST = 0.1
_INK, _FAINT, _RULE = "#22303c", "#9fb0bf", "#d5dde3"
_LOSS, _HELD_OUT, _RATE, _CONTEXT, _BASE = "#2f6fa7", "#c8532d", "#4b8b5b", "#7a5ea8", "#a8772b"
# Told apart by people with any colour vision (after Paul Tol's muted scheme), light enough for dark text on top.
_SOURCES = (
    "#88b7dd",
    "#e8c268",
    "#7fc0a4",
    "#e09a8a",
    "#b9a1d6",
    "#c5cf7d",
    "#9ed3d9",
    "#dba3c4",
    "#c9bda6",
    "#a9b4bd",
)
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def save_picture(tracks: Sequence[Track], path: Path) -> None:
    """Draws the timeline and puts it at `path` in one step."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 8.2), dpi=130, facecolor="white")
        rows = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": [5, 1.6, 1, 1, 2], "hspace": 0.16})
        edges = _edges(tracks)
        _draw_loss(rows[0], tracks, edges)
        _draw_rate(rows[1], tracks, edges)
        _draw_context(rows[2], tracks, edges)
        _draw_base(rows[3], tracks, edges)
        _draw_mixture(rows[4], tracks, edges)
        for row in rows:
            _draw_bands(row, edges)
        _name_stages(rows[0], tracks, edges)
        _label_tokens(rows[4], tracks, edges)
        figure.subplots_adjust(left=0.075, right=0.97, top=0.93, bottom=0.07)
        aside = path.with_name(path.name + ".new")
        figure.savefig(aside, format="png")
        os.replace(aside, path)


def _edges(tracks: Sequence[Track]) -> list[float]:
    """Where stages begin and end, on an axis from 0 to 1."""
    total = tracks[-1].last_token
    shares = np.array([max((t.last_token - t.first_token) / total, _NARROWEST) for t in tracks])
    return np.cumsum([0.0, *shares / shares.sum()]).tolist()


def _place(tokens: Sequence[int], track: Track, left: float, right: float) -> Any:
    span = track.last_token - track.first_token
    return left + (np.asarray(tokens, float) - track.first_token) / span * (right - left)


def _spans(tracks: Sequence[Track], edges: list[float]) -> Iterator[tuple[Track, float, float]]:
    for track, (left, right) in zip(tracks, itertools.pairwise(edges), strict=True):
        yield track, left, right


def _draw_bands(axes: Any, edges: list[float]) -> None:
    """Stages alternate in shade, behind everything."""
    axes.set_xlim(0, 1)
    for number, (left, right) in enumerate(itertools.pairwise(edges)):
        if number % 2:
            axes.axvspan(left, right, color="#f3f6f8", zorder=-2, linewidth=0)
    for edge in edges[1:-1]:
        axes.axvline(edge, color=_RULE, linewidth=0.8, zorder=-1)


def _name_stages(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    for track, left, right in _spans(tracks, edges):
        middle = (left + right) / 2
        name = track.stage.name
        anchor = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(middle, 1.055, name, weight="bold", fontsize=10, **anchor)
        done = track.steps[-1]["step"] if track.steps else 0
        tokens = f"{short(track.last_token - track.first_token)} tokens"
        axes.text(middle, 1.01, tokens if done else f"{tokens}, to come", color="#5f7282", fontsize=8, **anchor)


def _draw_loss(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    smooth_end: list[float] = []
    shown: list[float] = []
    for track, left, right in _spans(tracks, edges):
        if track.evaluations:
            tokens, losses = zip(*track.evaluations)
            x = _place(tokens, track, left, right)
            axes.plot(x, losses, color=_HELD_OUT, linewidth=1, marker="o", markersize=3.5, zorder=4)
            shown += losses
        if not track.steps:
            continue
        x = _place([s["tokens"] for s in track.steps], track, left, right)
        raw = np.array([np.nan if s["loss"] is None else s["loss"] for s in track.steps])
        smooth = _smoothed(raw)
        axes.plot(x, raw, color=_LOSS, linewidth=0.6, alpha=0.3)
        axes.plot(x, smooth, color=_LOSS, linewidth=1.8)
        shown += smooth[np.isfinite(smooth)].tolist()
        smooth_end.append(float(smooth[-1]))
    axes.set_ylabel("loss\nnats per token")
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(max(0.0, low - 0.1 * (high - low)), high + 0.05 * (high - low) + 1e-6)
    axes.grid(axis="y", color=_RULE, linewidth=0.5)
    axes.plot([], [], color=_LOSS, linewidth=1.8, label="training")
    if any(track.evaluations for track in tracks):
        axes.plot([], [], color=_HELD_OUT, linewidth=1, marker="o", markersize=3.5, label="held-out")
    axes.legend(loc="upper right", frameon=False, fontsize=8)


def _smoothed(values: Any) -> Any:
    """Exponential mean over about a fiftieth of the steps."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    means = []
    for value in values:
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else np.nan)
    return np.array(means)


def _draw_rate(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    for track, left, right in _spans(tracks, edges):
        if track.steps:
            x = _place([s["tokens"] for s in track.steps], track, left, right)
            axes.fill_between(x, [s["lr"] for s in track.steps], color=_RATE, alpha=0.18, linewidth=0)
            axes.plot(x, [s["lr"] for s in track.steps], color=_RATE, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.locator_params(axis="y", nbins=3)
    axes.set_ylabel("learning\nrate")


def _draw_context(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    lengths = [track.stage.config.train.context_length for track in tracks]
    corners = [[(left, float(n)), (right, float(n))] for n, (left, right) in zip(lengths, itertools.pairwise(edges))]
    _draw_levels(axes, corners, [short_power(length) for length in lengths], _CONTEXT, "context\nlength")


def _draw_base(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    corners = []
    for track, left, right in _spans(tracks, edges):
        config, span = track.stage.config, track.last_token - track.first_token
        turn = min(span, config.schedule.rope_tokens)
        at = [(0, left), (turn, left + turn / span * (right - left)), (span, right)]
        corners.append([(x, config.rope_base_at(tokens)) for tokens, x in at])
    texts = [rope_text(track.stage.config).splitlines()[0] for track in tracks]
    _draw_levels(axes, corners, texts, _BASE, "RoPE\nbase")


def _draw_levels(axes: Any, corners: list[list[tuple[float, float]]], texts: list[str], color: str, label: str) -> None:
    """A line through the (x, value) corners of all stages, on a logarithmic axis without numbers: they stand on it."""
    xs, values = zip(*itertools.chain.from_iterable(corners))
    ys = np.log2(values)
    axes.plot(xs, ys, color=color, linewidth=1.8, solid_joinstyle="miter")
    axes.fill_between(xs, ys, ys.min() - 10, color=color, alpha=0.12, linewidth=0)
    room = max(1.0, ys.max() - ys.min())
    axes.set_ylim(ys.min() - 0.75 * room, ys.max() + 0.35 * room)
    for text, stage in zip(texts, corners, strict=True):
        middle, below = (stage[0][0] + stage[-1][0]) / 2, np.log2(min(value for _, value in stage)) - 0.12 * room
        axes.text(middle, below, text, ha="center", va="top", fontsize=8)
    axes.set_yticks([])
    axes.set_ylabel(label)


def _draw_mixture(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    names = list(dict.fromkeys(name for track in tracks for name in mixture(track.stage.config.data)))
    color_of = dict(zip(names, itertools.cycle(_SOURCES)))
    for track, left, right in _spans(tracks, edges):
        below = 0.0
        for name, share in mixture(track.stage.config.data).items():
            axes.fill_between([left, right], below, below + share, color=color_of[name], linewidth=0)
            axes.plot([left, right], [below, below], color="white", linewidth=0.8)
            if share >= 0.09:
                room = int((right - left) * 130)
                text = f"{name} {share:.0%}" if len(name) + 4 <= room else name if len(name) <= room else f"{share:.0%}"
                axes.text((left + right) / 2, below + share / 2, text, ha="center", va="center", fontsize=7.5)
            below += share
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel("mixture")


def _label_tokens(axes: Any, tracks: Sequence[Track], edges: list[float]) -> None:
    """Tokens since the first step, at the stages' ends."""
    axes.set_xticks(edges, ["0", *(short(track.last_token) for track in tracks)])
    widths = [(t.last_token - t.first_token) / tracks[-1].last_token for t in tracks]
    narrow = any(width < _NARROWEST for width in widths)
    axes.set_xlabel("tokens" + (" (widths of short stages not to scale)" if narrow else ""))
