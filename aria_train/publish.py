"""Folders that are complete or absent: built aside, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from aria_train.errors import DataError


@contextlib.contextmanager
def workplace_beside(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, on the same file system, that is gone afterwards whatever happens.

    Those that a killed process of this machine left behind for the same target are removed too.
    """
    owner = f".{target.name}.preparing-{socket.gethostname()}-"
    for stale in target.parent.glob(f"{_literal(owner)}*"):
        number = stale.name.removeprefix(owner)
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = target.parent / f"{owner}{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}. Choose another place.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(target: str | Path, overwrite: bool, what: str) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if the block succeeds. Refuses to replace one unless told to."""
    target = Path(target)
    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists already. Choose another place for the {what}, or give --overwrite.")
    with workplace_beside(target) as workplace:
        fresh = workplace / "fresh"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(workplace / "old")
        fresh.rename(target)


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
