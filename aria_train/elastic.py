"""torchrun with the signals and exit statuses that a scheduler needs: `python -m aria_train.elastic OPTIONS ...`.

Takes torchrun's options, and differs from it in five ways. A request to stop (SIGTERM, SIGUSR1, Ctrl-C) is passed on to
the workers, which take the time they need to save; torchrun gives them 30 seconds, and dies of SIGUSR1. Workers that
stopped on request are not started again, nor are those that met a mistake of the user's. Workers that are started again
meet in a store of their own: torchrun hands them that of those that failed, where they find the addresses of the dead
and wait for them. And the exit status says what to do: 0 done, 2 the user can mend it, 75 start it again, anything else
a failure that restarts did not cure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aria_train.errors import EXIT_RESTART, EXIT_USER_ERROR
from aria_train.train.signals import PASSED_ON, STOP_ASKED, STOP_SIGNALS

STATUS_FILE = "ARIA_TRAIN_STATUS_FILE"
"""Environment variable: where a worker that stopped on request says so, to leave with status 0. torchrun knows no
other way for a worker to end without being started again."""


def leave_stopped() -> int:
    """The status for a worker that has saved and stopped on request."""
    file = os.environ.get(STATUS_FILE)
    if file is None:
        return EXIT_RESTART
    Path(file).write_text(str(EXIT_RESTART))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun in this process; returns the exit status."""
    asked = _pass_signals_on()
    _leave_mistakes_alone()
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="aria-train-") as folder:
        os.environ[STATUS_FILE] = f"{folder}/status"
        try:
            # Signals that torchrun handles kill the workers after 30 seconds.
            run.main(["--signals-to-handle=SIGHUP,SIGQUIT", *(sys.argv[1:] if arguments is None else arguments)])
        except ChildFailedError as error:
            statuses = {failure.exitcode for failure in error.failures.values()}
            for known in (EXIT_USER_ERROR, EXIT_RESTART):
                if known in statuses:
                    return known
            return EXIT_RESTART if asked else 1
        stopped = Path(os.environ[STATUS_FILE]).exists()
    return EXIT_RESTART if stopped else 0


def _pass_signals_on() -> list[int]:
    """Sends the stop signals to the workers; returns a list that will hold those received."""
    asked: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        # The first comes as a signal that never counts as the second; workers that start from now on see it too.
        to_send = number if asked and number != PASSED_ON else PASSED_ON
        asked.append(number)
        os.environ[STOP_ASKED] = "1"
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, to_send)

    for number in (*STOP_SIGNALS, PASSED_ON):
        signal.signal(number, pass_on)
    return asked


def _leave_mistakes_alone() -> None:
    """Has no workers started again where one of them ended with what only the user can mend."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    look = LocalElasticAgent._monitor_workers

    def look_for_mistakes(agent: Any, workers: Any) -> Any:
        result = look(agent, workers)
        if any(failure.exitcode == EXIT_USER_ERROR for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = look_for_mistakes  # type: ignore[method-assign]


def _children() -> list[int]:
    """Processes that this one started. `ps` is asked only where there is no /proc: slim images do without it."""
    pairs = list(_parents_in_proc())
    if not pairs:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [(int(pid), int(parent)) for pid, parent in (line.split() for line in listing.splitlines())]
    return [pid for pid, parent in pairs if parent == os.getpid()]


def _parents_in_proc() -> Iterator[tuple[int, int]]:
    """(process, its parent) for every process, where Linux tells it."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            # `pid (name) state parent ...`; a name may hold anything.
            yield int(file.parent.name), int(file.read_bytes().rpartition(b")")[2].split()[1])


if __name__ == "__main__":
    sys.exit(main())
