"""Folders that are complete or absent: built aside, then renamed into place."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
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
def replacing(target: str | Path, overwrite: bool, what: str, files: Sequence[str] = ("*",)) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if the block succeeds. Refuses what `refuse_existing` does."""
    target = Path(target)
    refuse_existing(target, overwrite, what, files)
    with workplace_beside(target) as workplace:
        fresh = workplace / "fresh"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(workplace / "old")
        fresh.rename(target)


def refuse_existing(target: str | Path, overwrite: bool, what: str, files: Sequence[str] = ("*",)) -> None:
    """Raises DataError if there is something at `target`, unless it may be overwritten and is a `what`, or empty.

    A `what` is a folder that has an entry of the first pattern of `files`, and none that matches none of them.
    """
    target = Path(target)
    if target.name in ("", ".."):
        raise DataError(f"{target}: not a name for a new folder. Choose one for the {what}.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise DataError(f"{target}: exists already. Choose another place for the {what}, or give --overwrite.")
    advice = f"--overwrite replaces a {what} and nothing else. Choose another place, or move it away."
    if not target.is_dir():
        raise DataError(f"{target}: is not a folder. {advice}")
    try:
        names = sorted(os.listdir(target))
    except OSError as error:
        raise DataError(f"{target}: cannot be read: {error.strerror}. {advice}") from None
    foreign = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in files)]
    if foreign:
        raise DataError(f"{target}: holds {foreign[0]}, which is no part of a {what}. {advice}")
    if names and not fnmatch.filter(names, files[0]):
        raise DataError(f"{target}: holds no {files[0]}, as a {what} does. {advice}")


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
