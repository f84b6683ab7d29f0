"""What a corpus gives the loader: windows of packed documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from aria_train.data.multimodal.images import ProcessedImage


@dataclass
class Window:
    """Whole documents (or pieces of one too long to fit) laid end to end, without padding."""

    token_ids: NDArray[np.int32]
    """int32 [n], n <= context length"""
    labels: NDArray[np.int32]
    """int32 [n]: the token each position predicts, or IGNORE_LABEL"""
    document_lengths: NDArray[np.int32]
    """int32 [d], summing to n"""
    images: list[ProcessedImage] = field(default_factory=list)
    """In order of appearance in `token_ids`."""


class Source(Protocol):
    """A corpus cut into windows. Safe to read from many threads; the same position always gives the same window."""

    name: str
    num_windows: int
    """Windows in one epoch."""

    @property
    def fingerprint(self) -> str:
        """Tells the corpus apart from others, wherever it lies."""
        ...

    def read(self, position: int) -> Window:
        """The window at a position in [0, num_windows). Raises DataError where the data cannot be used."""
        ...

    def work(self, position: int) -> float:
        """About how many floating-point operations that window takes, found without reading it."""
        ...
