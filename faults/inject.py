"""One rank's life with a fault in it. Runs in processes that `tests.distributed.launch` starts and may lose."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from aria_train.cli import main

SAVE_PLACES = (
    "before its folder is made",
    "before the tensors are written",
    "before the checksums",
    "before the manifest",
    "between the manifest and the rename",
    "after the rename",
)
HAND_OVER_PLACES = ("after the last save", "before the weights are taken over", "after they are taken over")


def live(arguments: list[str], fault: tuple[Any, ...] = ()) -> tuple[int, str]:
    """Runs the command line on this rank, with a fault such as ("in step", 7, 0, "SIGKILL"); returns its status and
    all it said."""
    if fault:
        kind, *details = fault
        kinds: dict[str, Callable[..., None]] = {
            "in step": in_step,
            "in save": in_save,
            "in hand-over": in_hand_over,
            "at random": at_random,
        }
        kinds[kind](*details)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(arguments)
    return status, " ".join(said.getvalue().split())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def in_step(step: int, rank: int, what: str) -> None:
    """At the beginning of a step, on one rank (-1: all)."""
    from aria_train.train.trainer import Trainer

    take_step = Trainer._step

    def with_fault(self: Any, batches: Any) -> Any:
        if self.state.step + 1 == step and rank in (-1, dist.get_rank()):
            act(what, self)
        return take_step(self, batches)

    Trainer._step = with_fault  # type: ignore[method-assign]


def act(what: str, trainer: Any) -> None:
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        time.sleep(0.5)
    elif what == "sleep":
        time.sleep(3600)
    elif what == "exit":
        os._exit(1)
    elif what == "remove checkpoints":
        trainer.saver.wait()
        shutil.rmtree(Path(trainer.config.train.run_dir) / "checkpoints", ignore_errors=True)
    else:
        raise AssertionError(what)


def in_save(step: int, place: str) -> None:
    """SIGKILL to the first rank while the checkpoint of a step is written."""
    from aria_train.parallel.checkpoint import writing

    name, target_is_it = f"step_{step:08d}", False
    together, publish, sync_folder = writing._together, writing._publish, writing.sync_folder
    phases, syncs = iter(SAVE_PLACES[:4]), iter(SAVE_PLACES[4:])

    def with_fault(phase: Callable[[], None], folder: Any, target: Any, group: Any) -> None:
        if target.name == name and next(phases) == place and dist.get_rank() == 0:
            die()
        together(phase, folder, target, group)

    def noting(folder: Any, target: Any, manifest: Any) -> None:
        nonlocal target_is_it
        target_is_it = target.name == name
        publish(folder, target, manifest)

    def syncing(folder: Any) -> None:
        sync_folder(folder)
        if target_is_it and next(syncs) == place:
            die()

    writing.sync_folder = syncing
    writing._together = with_fault  # type: ignore[assignment]
    writing._publish = noting  # type: ignore[assignment]


def in_hand_over(before: str, after: str, place: str) -> None:
    """SIGKILL to the first rank between two stages, given by name."""
    from aria_train.train import trainer

    fill, close = trainer.fill_weights, trainer.Trainer.close

    def filling(model: Any, config: Any) -> Any:
        strikes = config.stage == after and dist.get_rank() == 0
        if strikes and place == HAND_OVER_PLACES[1]:
            die()
        lines = fill(model, config)
        if strikes and place == HAND_OVER_PLACES[2]:
            die()
        return lines

    def closing(self: Any) -> None:
        if self.config.stage == before and dist.get_rank() == 0 and place == HAND_OVER_PLACES[0]:
            self.saver.wait()
            die()
        close(self)

    trainer.fill_weights = filling
    trainer.Trainer.close = closing  # type: ignore[method-assign]


def at_random(seed: int, longest: float) -> None:
    """SIGKILL to one rank, or to all, within so many seconds."""
    chance = random.Random(seed)
    victims = chance.choice(((0,), (1,), (0, 1)))
    after = chance.uniform(0.0, longest)
    if dist.get_rank() in victims:
        threading.Timer(after, die).start()
