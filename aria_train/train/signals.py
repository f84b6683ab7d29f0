"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ask a run to save and leave at the end of the step.

A second signal ends the process at once. Launchers and schedulers repeat themselves, though: signals of the same kind
within a second and of another kind within five are one request, and SIGUSR2, as which launchers pass one on, never
counts as the second.

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
PASSED_ON = signal.SIGUSR2
STOP_ASKED = "ARIA_TRAIN_STOP_ASKED"
"""Environment variable that the launcher sets for workers it starts after it was asked to stop."""
_SAME_KIND, _OTHER_KIND = 1.0, 5.0
"""Seconds within which a signal repeats the first."""

_asked = False


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _asked


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Within this block the stop signals are requests, which the training loop looks for with `asked`.

    Only in the main thread; elsewhere the block changes nothing.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = STOP_ASKED in os.environ
    writer, reader = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _nothing) for number in (*STOP_SIGNALS, PASSED_ON)}
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
    global _asked
    first: tuple[int, float] | None = None
    with reader:
        while data := reader.recv(64):
            for number in data:
                if number not in (*STOP_SIGNALS, PASSED_ON):
                    continue
                _asked = True
                if first is None:
                    first = (number, time.monotonic())
                    continue
                repeated = _SAME_KIND if number == first[0] else _OTHER_KIND
                if number != PASSED_ON and time.monotonic() - first[1] > repeated:
                    os._exit(128 + number)
