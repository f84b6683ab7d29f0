"""What a run makes sure of before it starts: that its folders can be written to, that nobody else trains in them, and
that it does not begin anew where it ought to go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import yaml

from aria_train.config import RunConfig
from aria_train.errors import CheckpointError, ConfigError
from aria_train.parallel.checkpoint import Entry, Folder, home_of, locate, try_writing

_PATIENCE = 120.0
"""Seconds to wait for a lock: a file server may keep that of a machine that died for 90."""


def make_run_dir(run_dir: Path) -> None:
    """Makes the run directory and sees that files can be made in it, before any work is done."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise not_writable(run_dir, error) from None


def not_writable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"train.run_dir {run_dir} cannot be written to: {error.strerror or error}. Give a folder that can be, or "
        "mend its permissions or free space."
    )


class RunLock:
    """Keeps others from training in a run directory, from `acquire` to `release` or to the end of the process, however
    it ends. Does nothing where the file system has no locks."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def acquire(self, say: Callable[[str], None]) -> None:
        """Waits a while for a lock that another process has, saying so once.

        Raises ConfigError, which names that process, if it keeps it.
        """
        try:
            self._file = (self._run_dir / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise not_writable(self._run_dir, error) from None
        end, told = time.monotonic() + _PATIENCE, False
        while not self._try():
            if time.monotonic() > end:
                holder = self._holder()
                self.release()
                raise ConfigError(
                    f"train.run_dir {self._run_dir} is in use: {holder} trains in it. Wait for that run to end, or "
                    "stop it, or give another train.run_dir."
                )
            if not told:
                say(f"{self._run_dir} is in use by {self._holder()}; waiting up to {_PATIENCE:.0f} s for it to end")
                told = True
            time.sleep(min(1.0, _PATIENCE / 10))
        with contextlib.suppress(OSError):  # A full disk: held all the same.
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # No locks here.
        return True

    def _holder(self) -> str:
        assert self._file is not None
        self._file.seek(0)
        return self._file.read(200).strip() or "another process"

    def release(self) -> None:
        """Lets others in. Safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def check_fresh_start(config: RunConfig, passed: Sequence[Entry[Folder]]) -> None:
    """Called where there is no checkpoint to go on from; `passed` are those that cannot be used.

    Raises CheckpointError if beginning at the first step would overwrite what an earlier run has left. One that was
    killed before it had saved leaves nothing but metrics, and begins again.
    """
    damaged = [entry for entry in passed if not entry.is_unfinished]
    if damaged:
        told = " ".join(f"{entry.folder.name}: {entry.problem}" for entry in damaged)
        raise CheckpointError(
            f"{home_of(config)} holds checkpoints, but none that is intact, and a run that began anew would overwrite "
            f"them. {told} To start over, move the folder checkpoints away, or give another train.run_dir."
        )
    run_dir = Path(config.train.run_dir)
    before, metrics = _storage_before(run_dir), run_dir / "metrics.jsonl"
    if before is None or not metrics.exists() or not metrics.stat().st_size:
        return
    now = str(home_of(config))
    if os.path.realpath(before) != os.path.realpath(now):
        raise CheckpointError(
            f"{run_dir} holds the record of a run whose checkpoints lie in {before}; checkpoint.storage is now {now}, "
            "where there is none, and a run that began anew would overwrite the record. Set checkpoint.storage back, "
            f"or move the folder checkpoints to {now}; to start over, give another train.run_dir, or move "
            f"{metrics} away."
        )


def _storage_before(run_dir: Path) -> str | None:
    """Where the run that last started in a run directory kept its checkpoints; None if it does not say."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return str(locate(config["checkpoint"]["storage"] or run_dir))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, ConfigError):
        return None


def check_storage(config: RunConfig) -> None:
    """Raises ConfigError unless checkpoints can be written to `checkpoint.storage`."""
    if config.checkpoint.storage is None:
        return
    try:
        try_writing(home_of(config))
    except ConfigError:
        raise
    except Exception as error:  # What an object store may raise has no common type.
        raise ConfigError(
            f"checkpoint.storage {config.checkpoint.storage} cannot be written to: {error!s:.300}. Give a path or URL "
            "that can be, or mend its permissions."
        ) from None
