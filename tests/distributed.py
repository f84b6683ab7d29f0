"""Runs a function on several ranks: `results = run_distributed(function, world_size, *args)`.

Ranks are processes forked from one server that has imported torch and this package once, so they start in a moment,
share nothing with each other or with earlier runs, and may be killed. They form a gloo group of the asked size.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])
_SILENT = object()


class RankFailure(AssertionError):
    """A rank raised, died, or did not come back in time."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Calls `function(*args)` on every rank of a fresh process group; returns what each rank returned.

    The function is found by its module and name, arguments and results travel by pickle. Raises RankFailure, with
    the tracebacks of the ranks that raised or hung, if any rank fails or `timeout` seconds pass; no process is left.
    """
    outcomes = launch(function, world_size, *args, timeout=timeout)
    failed = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, RankFailure)]
    if failed:
        raise RankFailure("\n".join(failed))
    return outcomes


def launch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Like `run_distributed`, but a rank that fails gives a RankFailure in its place. As under torchrun, the first
    failure ends the other ranks; those that it ended give a RankFailure too."""
    folder = tempfile.mkdtemp(prefix="ranks-")
    ranks = []
    try:
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_work, args=(sender, rank, world_size, folder, function, args), daemon=True
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        outcomes = _collect(ranks, timeout)
        return [_where(ranks[n][0], folder, n) if outcome is _SILENT else outcome for n, outcome in enumerate(outcomes)]
    finally:
        for process, receiver in ranks:
            process.kill()
            process.join()
            receiver.close()
        shutil.rmtree(folder, ignore_errors=True)


def _collect(ranks: list[Any], timeout: float) -> list[Any]:
    """What each rank sends before its pipe closes; after a failure the others have two seconds more to send it."""
    outcomes: list[Any] = [_SILENT] * len(ranks)
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = waiting.pop(receiver)
            outcomes[rank] = _receive(receiver, ranks[rank][0])
            if isinstance(outcomes[rank], RankFailure):
                deadline = min(deadline, time.monotonic() + 2)
    return outcomes


def _where(process: Any, folder: str, rank: int) -> RankFailure:
    """Asks a rank that says nothing for its stacks."""
    stacks = Path(folder, f"stacks_{rank}")
    if stacks.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
    return RankFailure("had to be ended while at:\n" + (stacks.read_text() if stacks.exists() else "its start"))


def _receive(receiver: Any, process: Any) -> Any:
    try:
        succeeded, payload = receiver.recv()
    except EOFError:
        process.join(5)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return RankFailure(f"died without a word ({how})")
    return pickle.loads(payload) if succeeded else RankFailure(payload)


def _work(
    sender: Any, rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One rank's life."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stacks_{rank}", "w"))  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        dist.barrier()  # a rank that has ended before all are connected would be an error on the others
        # Plain pickle copies tensors; multiprocessing's own would share memory that goes with this process.
        answer = (True, pickle.dumps(function(*args)))
    except BaseException:
        answer = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        sender.send(answer)
    sender.close()
    # No orderly end: a rank whose peers have failed would wait for them.
    os._exit(0)
