"""Processes that work on units of the input, whose results come in order."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from aria_train.errors import DataError

U = TypeVar("U")
R = TypeVar("R")


@contextlib.contextmanager
def worker_pool(processes: int, start: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that call `start(*arguments)` first, leave interruptions to this one, and end when it does."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_process, (start, *arguments))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: ProcessPoolExecutor, work: Callable[[U], R], units: Iterable[U], ahead: int, problem: Callable[[U], str]
) -> Iterator[tuple[U, R]]:
    """Each unit with what `work` makes of it, in order, at most `ahead` of them under way.

    Raises DataError if a process dies, with what `problem` says of the unit that was at work.
    """
    units = iter(units)
    pending: collections.deque[tuple[U, Future[R]]] = collections.deque()
    try:
        while True:
            for unit in itertools.islice(units, ahead - len(pending)):
                pending.append((unit, pool.submit(work, unit)))
            if not pending:
                return
            unit, future = pending.popleft()
            yield unit, future.result()
    except BrokenProcessPool:
        raise DataError(problem(unit)) from None


def _start_process(start: Callable[..., None], *arguments: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One core per process is what we have.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides when to stop.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
