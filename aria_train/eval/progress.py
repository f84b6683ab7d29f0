"""How far an evaluation is, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]
"""Told how many more of something are done."""


def no_progress(_count: int) -> None:
    """An evaluation that nobody watches."""


@contextmanager
def progress_bar(what: str, total: int, shown: bool) -> Iterator[Advance]:
    """A bar that lasts as long as the block, on the one rank that shows it and where there is a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
