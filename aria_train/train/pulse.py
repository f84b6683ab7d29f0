"""What ranks tell one another every step, inside the metrics' all-reduce: it costs no collective of its own.

Whether one of them was asked to stop, whether a save is due by the clock of the first, and how long each took for work
that waits for no other rank: getting its data, and a fixed matrix product. (A step lasts equally long on all ranks,
since they wait for each other in it; who is waited for shows in these alone.)
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.parallel.mesh import Meshes
from aria_train.train import signals

_REMEMBERED = 20
"""Steps whose median counts, so that a hiccup names nobody."""
_LATE = 0.1
"""Share of a step that a rank must wait longer for its data than most to be named."""
_SLOW = 1.5
"""Times the median of all ranks that the product must take on one of them for it to be named."""


class Pulse:
    """One per run. Every step: `next_batches`, then `beat` into the all-reduce, and its sum to `hear`."""

    def __init__(self, meshes: Meshes, save_minutes: float) -> None:
        self._rank, self._world_size, self._device = meshes.rank, meshes.world_size, meshes.device
        self._save_seconds = save_minutes * 60
        self._saved = time.monotonic()
        self._data_seconds = 0.0
        self._history: deque[Tensor] = deque(maxlen=_REMEMBERED)
        size = 2048 if meshes.device.type == "cuda" else 192
        self._factor = torch.ones(size, size, device=meshes.device)
        self.stop_asked = False
        """Whether, as of the last step, any rank was asked to stop; the same on all."""
        self.save_due = False
        """Whether, as of the last step, `checkpoint.interval_minutes` have passed; the same on all."""

    def next_batches(self, loader: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        """The micro-batches of the next step; how long they take to come is remembered."""
        began = time.perf_counter()
        batches = next(loader)
        self._data_seconds = time.perf_counter() - began
        return batches

    def saved(self) -> None:
        """A save begins: the next one is due `checkpoint.interval_minutes` from now."""
        self._saved = time.monotonic()

    def beat(self) -> Tensor:
        """What this rank adds to the sum: float64 [2 + 2 * ranks]."""
        due = self._save_seconds > 0 and self._rank == 0 and time.monotonic() - self._saved >= self._save_seconds
        own = torch.zeros(2 + 2 * self._world_size, dtype=torch.float64)
        own[0] = signals.asked()
        own[1] = due
        own[2 + self._rank] = self._data_seconds
        own[2 + self._world_size + self._rank] = self._product_seconds()
        return own

    def hear(self, total: Tensor) -> None:
        """Takes the sum over all ranks."""
        total = total.cpu()
        self.stop_asked, self.save_due = bool(total[0]), bool(total[1])
        self._history.append(total[2:].view(2, self._world_size))

    def straggler(self, step_seconds: float) -> dict[str, Any]:
        """Names the rank that the others wait for, as metrics; nothing while there is none."""
        if self._world_size == 1 or len(self._history) < _REMEMBERED // 2:
            return {}
        data, product = torch.stack(list(self._history)).median(0).values.tolist()
        for what, seconds, bound in (
            ("data", data, statistics.median(data) + _LATE * step_seconds),
            ("computation", product, statistics.median(product) * _SLOW),
        ):
            slowest = max(range(self._world_size), key=seconds.__getitem__)
            if seconds[slowest] > bound:
                times = seconds[slowest] / max(statistics.median(seconds), 1e-9)
                return {"straggler": slowest, "straggler_in": what, "straggler_times_median": times}
        return {}

    def _product_seconds(self) -> float:
        """Seconds this device takes for a product of fixed size."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        product = self._factor @ self._factor
        product[0, 0].item()
        return time.perf_counter() - began
