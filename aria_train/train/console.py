"""What a training run shows: a progress bar in a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

GIB = 1024**3


class Console:
    """Progress of one run of `total_steps` optimizer steps. With `enabled` false (other ranks) it says nothing."""

    def __init__(self, total_steps: int, enabled: bool = True) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._rich = rich.console.Console(highlight=False)
        self._live: Live | None = None
        self._step = 0
        self._facts: list[str] = []
        # Over the last hundred steps, pauses to evaluate and save included: what the near future looks like.
        self._recent: deque[tuple[int, float]] = deque(maxlen=100)
        self._started = self._last_line = 0.0

    def start(self, step: int) -> None:
        """Begins to show a run that has `step` steps behind it."""
        self._step = step
        self._started = time.monotonic()
        self._recent.append((step, self._started))
        if self._enabled and self._rich.is_terminal:
            self._live = Live(get_renderable=self._draw, console=self._rich, refresh_per_second=4)
            self._live.start()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a finished step, named as in `metrics.jsonl`."""
        if not self._enabled:
            return
        now = time.monotonic()
        first = not self._recent or self._step == self._recent[0][0]
        self._step = metrics["step"]
        self._recent.append((self._step, now))
        last = self._step >= self._total
        # Plain lines come every 5 s at first, and every minute once a run is 20 minutes old.
        due = now - self._last_line >= min(max((now - self._started) / 20, 5), 60)
        if self._live is None and not (first or due or last):
            return
        self._facts = facts(metrics)
        if self._step < self._total:
            self._facts.append(f"{format_duration(self._seconds_left())} left")
        if self._live is None:
            self._last_line = now
            print("  ".join([f"step {self._step}/{self._total}", *self._facts]), flush=True)

    def message(self, text: str) -> None:
        """A line of its own, above the progress bar."""
        if not self._enabled:
            return
        if self._live is None:
            print(text, flush=True)
        else:
            self._rich.print(text, markup=False)

    def stop(self) -> None:
        """Ends the display, leaving its last state. Safe to call twice, and after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _seconds_left(self) -> float:
        (first, since), (last, until) = self._recent[0], self._recent[-1]
        return (until - since) / max(last - first, 1) * (self._total - self._step)

    def _draw(self) -> rich.console.RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(ProgressBar(self._total, self._step), Text(f"step {self._step}/{self._total}"))
        return rich.console.Group(bar, Text("  ".join(self._facts), style="dim"))


def facts(metrics: Mapping[str, Any]) -> list[str]:
    """A step's metrics as short texts, in reading order. What the metrics lack is left out."""
    texts = []
    for name, template in (
        ("tokens", "{} tokens"),
        ("loss", "loss {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.3f}"),
        ("tokens_per_second", "{} tokens/s"),
    ):
        if metrics.get(name) is not None:
            value = metrics[name]
            texts.append(template.format(format_count(value) if name.startswith("tokens") else value))
    return [*texts, f"peak {metrics.get('memory_gib') or peak_memory_gib():.2f} GiB"]


def format_count(value: float) -> str:
    """1234567 -> 1.23M."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.2f}{suffix}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """131 -> 2:11, 90000 -> 1d 1:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock


def peak_memory_gib() -> float:
    """The most memory this process has held: allocated on its GPU where it uses one, resident in RAM otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
