"""The checkpoints of a run: which there are, which is the newest to be trusted, and which may go.

They lie in `checkpoints/` of the run directory, or of `checkpoint.storage` where that is given: its `home`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from aria_train.config import RunConfig
from aria_train.config.reading import read_yaml
from aria_train.errors import CheckpointError, ConfigError
from aria_train.parallel.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from aria_train.parallel.checkpoint.reading import verify
from aria_train.parallel.checkpoint.storage import Folder, RemotePath, locate
from aria_train.parallel.checkpoint.writing import WRITING, discard
from aria_train.parallel.collectives import broadcast_object

F = TypeVar("F", Path, RemotePath, Folder)


@dataclass
class Entry(Generic[F]):
    """A folder among a run's checkpoints. Complete if it has a manifest and every file is at its size."""

    folder: F
    manifest: Manifest | None
    problem: str = ""
    """Why it is not complete."""
    is_unfinished: bool = False
    """Whether it is being written, or was, or is half removed."""


def home_of(config: RunConfig) -> Folder:
    """Where a run keeps its checkpoints."""
    return locate(config.checkpoint.storage or Path(config.train.run_dir))


def folder_of_step(home: F, step: int) -> F:
    return home / "checkpoints" / f"step_{step:08d}"


def entries(home: F) -> list[Entry[F]]:
    """All checkpoints of a run, oldest first, also those that are torn or being written."""
    shelf = home / "checkpoints"
    if not shelf.is_dir():
        return []
    found = [(int(match[1]), folder) for folder in shelf.iterdir() if (match := _NAME.fullmatch(folder.name))]
    return [_inspect(folder) for _, folder in sorted(found, key=lambda pair: (pair[0], pair[1].name))]


_NAME = re.compile(rf"step_(\d+)(?:{re.escape(WRITING)})?")


def _inspect(folder: F) -> Entry[F]:
    if folder.name.endswith(WRITING) or not (folder / MANIFEST).exists():
        return Entry(folder, None, "its writing was interrupted", is_unfinished=True)
    try:
        return Entry(folder, read_manifest(folder))
    except CheckpointError as error:
        return Entry(folder, None, str(error))


def latest(home: F) -> tuple[F | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence about each torn one that was passed over."""
    passed: list[str] = []
    for entry in reversed(entries(home)):
        if entry.manifest is not None:
            return entry.folder, passed
        passed.append(f"ignored {entry.folder}: {entry.problem}")
    return None, passed


def newest_intact(home: F, before: int | None = None, good: bool = False) -> tuple[F | None, list[str]]:
    """The newest checkpoint whose every byte is as written, and a sentence about each that was passed over. Collective.

    With `before`, of those at an earlier step; with `good`, of those that no skipped step came right before.
    """
    candidates: list[F] = []
    passed: list[str] = []
    for entry in broadcast_object(lambda: list(reversed(entries(home)))):
        if entry.manifest is None:
            passed.append(f"ignored {entry.folder}: {entry.problem}")
        elif (before is None or entry.manifest.step < before) and (entry.manifest.is_good or not good):
            candidates.append(entry.folder)
    for folder in candidates:
        try:
            verify(folder)
        except CheckpointError as error:
            passed.append(f"ignored {folder}: {error}")
            continue
        return folder, passed
    return None, passed


def resolve(path: str | Folder) -> Folder:
    """A checkpoint folder, given itself, the run directory, or the `checkpoint.storage` around it."""
    path = _storage_of(path)
    folder = locate(path)
    if (folder / MANIFEST).exists():
        return folder
    if (folder / "checkpoints").is_dir():
        newest, passed = latest(folder)
        if newest is not None:
            return newest
        raise CheckpointError(f"run directory {folder} has no complete checkpoint. {' '.join(passed)}".strip())
    read_manifest(folder)
    return folder


def _storage_of(path: str | Folder) -> str | Folder:
    """Where the run of a run directory keeps its checkpoints, by its config.yaml; of anything else, the path itself."""
    file = locate(path) / "config.yaml"
    if not isinstance(file, Path) or not file.is_file():
        return path
    try:
        section = read_yaml(file)[0].get("checkpoint")
    except ConfigError:
        return path
    storage = section.get("storage") if isinstance(section, dict) else None
    return storage if isinstance(storage, str) else path


def prune(home: F, keep_last: int, keep_every_steps: int = 0, unfinished: bool = True) -> list[F]:
    """Removes all but the newest complete checkpoints, and what interrupted savings left. One rank calls it.

    Those of steps that are multiples of `keep_every_steps` stay, and so does the newest good one, to which a rollback
    would return. Damaged ones stay too: what cannot be read now may be readable tomorrow. With `unfinished` false,
    folders that a run may be writing at the moment are left alone. Returns what went.
    """
    found = entries(home)
    complete = [(entry.folder, entry.manifest) for entry in found if entry.manifest is not None]
    newest = {str(folder) for folder, _ in complete[-keep_last:]}
    newest |= {str(folder) for folder, _ in [pair for pair in complete if pair[1].is_good][-1:]}
    gone = [
        folder
        for folder, manifest in complete
        if str(folder) not in newest and not (keep_every_steps and manifest.step % keep_every_steps == 0)
    ]
    gone += [entry.folder for entry in found if entry.is_unfinished and unfinished]
    for folder in gone:
        discard(folder)
    return gone
