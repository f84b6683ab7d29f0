"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ask a run to save and leave at the end of the step.

A second signal, a second or more after the first, ends the process at once. (Launchers repeat the terminal's Ctrl-C
and the scheduler's SIGTERM to their children; so close to the first, it is the same request.)

Python runs signal handlers between instructions of the main thread, which may be waiting for another rank. So the
signals' numbers are read, as the interpreter writes them, by a thread of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_REQUEST = 1.0
"""Seconds within which signals count as one request."""

_received: signal.Signals | None = None


def received() -> signal.Signals | None:
    """The signal that asked this rank to stop, if one has."""
    return _received


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Within this block the stop signals are requests, which the training loop looks for with `received`.

    Only in the main thread; elsewhere the block changes nothing.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = None
    writer, reader = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _nothing) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # which ends the listener


def _nothing(_number: int, _frame: object) -> None:
    """A handler must exist, or the default one would end the process."""


def _listen(reader: socket.socket) -> None:
    global _received
    first = 0.0
    with reader:
        while data := reader.recv(64):
            for number in data:
                if number not in STOP_SIGNALS:
                    continue
                if _received is None:
                    _received, first = signal.Signals(number), time.monotonic()
                elif time.monotonic() - first > _SAME_REQUEST:
                    os._exit(128 + number)
