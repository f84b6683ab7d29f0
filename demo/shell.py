"""How the demo's scripts run the commands that a user would type, show them, and end when one fails."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aria_train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Commands run in it, so that paths in configurations and messages are short."""

_FAILED = "The command above ended with status {}. Run the same make target again to go on."


class DemoError(Exception):
    """The demo cannot go on; the message says what to do."""


def aria_train(*arguments: str) -> None:
    """Runs `aria-train ARGUMENTS`."""
    show("aria-train", *arguments)
    execute([sys.executable, "-m", "aria_train", *arguments])


def aria_train_together(jobs: Iterable[Sequence[Sequence[str]]]) -> None:
    """Runs jobs, each a few `aria-train ARGUMENTS` in turn, as many at once as there are cores. A command is shown,
    with what it said, when it has ended. Raises DemoError when all have ended if one failed."""

    def run(job: Sequence[Sequence[str]]) -> None:
        for arguments in job:
            command = [sys.executable, "-m", "aria_train", *arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(f"\n$ {shlex.join(['aria-train', *arguments])}\n{done.stdout.rstrip()}", flush=True)
            if done.returncode:
                raise DemoError(_FAILED.format(done.returncode))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(run, job) for job in jobs]:
            future.result()


def evaluate(*arguments: str) -> dict[str, Any]:
    """Runs `aria-train eval ARGUMENTS`; shows what it says and returns its result, the JSON of its last line."""
    show("aria-train", "eval", *arguments)
    done = subprocess.run(_evaluation(arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return _result(done, "")


def evaluate_aside(*arguments: str) -> dict[str, Any]:
    """The same beside other work: all is shown, with the command, when it has ended."""
    done = subprocess.run(_evaluation(arguments), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.rstrip(), file=sys.stderr, flush=True)
    return _result(done, f"\n$ {shlex.join(['aria-train', 'eval', *arguments])}\n")


def _evaluation(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "aria_train", "eval", *arguments]


def _result(done: subprocess.CompletedProcess[str], title: str) -> dict[str, Any]:
    *lines, last = done.stdout.splitlines() or [""]
    print(title + "\n".join(lines), flush=True)
    if done.returncode:
        raise DemoError(_FAILED.format(done.returncode))
    result: dict[str, Any] = json.loads(last)
    return result


def torchrun(processes: int, *arguments: str) -> None:
    """Runs `aria_train ARGUMENTS` under torchrun on this machine, its cores shared out among the processes."""
    command = ["-m", "aria_train.elastic", "--standalone", f"--nproc-per-node={processes}", "-m", "aria_train"]
    show("python", *command, *arguments)
    threads = max(1, (os.cpu_count() or 1) // processes)
    execute([sys.executable, *command, *arguments], OMP_NUM_THREADS=str(threads))


def show(*command: str) -> None:
    """Prints a command as it would be typed."""
    print(f"\n$ {shlex.join(command)}", flush=True)


def execute(command: Sequence[str], **environment: str) -> None:
    """Runs a command in the repository. Raises DemoError if it fails; it has said why."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal interrupts the whole group: let the command end in order before the demo does.
        process.wait()
        raise
    if status:
        raise DemoError(_FAILED.format(status))


def run_script(main: Callable[[], None]) -> None:
    """Runs a script of the demo; failures and interruptions end it without a traceback."""
    os.chdir(ROOT)
    try:
        main()
    except (DemoError, UserError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same make target goes on from here.")
