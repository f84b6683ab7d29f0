"""What preparation shows: progress while it runs, a table of what was made and what was skipped when it is done."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table

if TYPE_CHECKING:
    from aria_train.data.prepare.skips import SkipReport


class Progress:
    """A bar over bytes of input, with documents so far and time left; on stderr."""

    def __init__(self, total_bytes: int, what: str = "tokenizing") -> None:
        self._bar = RichProgress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[documents]:,} documents"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total_bytes, documents=0)

    def advance(self, num_bytes: int, documents: int) -> None:
        """`num_bytes` more are done; `documents` in all."""
        self._bar.update(self._task, advance=num_bytes, documents=documents)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()


def print_report(prefix: str, metadata: dict[str, dict[str, Any]], skips: SkipReport, characters: int) -> None:
    """One row per corpus, then one per reason for skipping."""
    console = Console()
    made = Table(
        Column("corpus", overflow="fold"), "documents", "tokens", "dtype", title="prepared", title_justify="left"
    )
    for suffix, entry in metadata.items():
        made.add_row(escape(f"{prefix}{suffix}"), f"{entry['documents']:,}", f"{entry['tokens']:,}", entry["dtype"])
    console.print(made)
    tokens = sum(entry["tokens"] for entry in metadata.values())
    console.print(f"{characters:,} characters, {characters / max(tokens, 1):.2f} per token")
    print_skipped(console, skips)


def print_skipped(console: Console, skips: SkipReport) -> None:
    """The reasons and how often each occurred, then the first places of each, uncut however long."""
    if not skips.counts:
        return
    table = Table("reason", "documents", title="skipped", title_justify="left")
    for reason, count in skips.counts.most_common():
        table.add_row(escape(reason), f"{count:,}")
    console.print(table)
    for reason, examples in skips.examples.items():
        for example in examples:
            console.print(f"  {reason}: {example}", markup=False, highlight=False, soft_wrap=True)
