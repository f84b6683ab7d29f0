"""The checkpoints of a run: which there are, which is the newest to be trusted, and which may go.

They lie in `checkpoints/` of the run directory, or of `checkpoint.storage` where that is given: its `home`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from aria_train.config import RunConfig
from aria_train.config.reading import read_yaml
from aria_train.errors import CheckpointError, ConfigError
from aria_train.parallel.checkpoint.manifest import MANIFEST, Manifest, check_sizes, read_manifest
from aria_train.parallel.checkpoint.reading import verify
from aria_train.parallel.checkpoint.storage import Folder, RemotePath, listing, locate
from aria_train.parallel.checkpoint.writing import REMOVING, WRITING, discard
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

    @property
    def step(self) -> int:
        """Of a complete one."""
        assert self.manifest is not None, f"{self.folder} is not complete"
        return self.manifest.step

    @property
    def remark(self) -> str:
        """A sentence about one that was passed over."""
        return f"ignored {self.folder}: {self.problem}"


def home_of(config: RunConfig) -> Folder:
    """Where a run keeps its checkpoints."""
    return locate(config.checkpoint.storage or Path(config.train.run_dir))


def folder_of_step(home: F, step: int) -> F:
    return home / "checkpoints" / f"step_{step:08d}"


def entries(home: F) -> list[Entry[F]]:
    """All checkpoints of a run, oldest first, also those that are torn or being written.

    Raises CheckpointError where the storage does not say which there are.
    """
    return list(_newest_first(home))[::-1]


_NAME = re.compile(rf"step_(\d+)({re.escape(WRITING)}|{re.escape(REMOVING)})?")


def _newest_first(home: F) -> Iterator[Entry[F]]:
    shelf = home / "checkpoints"
    found = [(int(match[1]), name) for name in listing(shelf) or () if (match := _NAME.fullmatch(name))]
    for _, name in sorted(found, reverse=True):
        inside = listing(shelf / name)
        # Another process may have removed it just now.
        if inside is not None:
            yield _inspect(shelf / name, inside)


def _inspect(folder: F, inside: Mapping[str, int | None]) -> Entry[F]:
    if folder.name.endswith(REMOVING):
        return Entry(folder, None, "its removal was interrupted", is_unfinished=True)
    # A store has no renames: there a folder is being written until its manifest comes.
    if folder.name.endswith(WRITING) or (isinstance(folder, RemotePath) and MANIFEST not in inside):
        return Entry(folder, None, "its writing was interrupted", is_unfinished=True)
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest, inside)
    except CheckpointError as error:
        return Entry(folder, None, str(error))
    return Entry(folder, manifest)


def latest(home: F) -> tuple[Entry[F] | None, list[Entry[F]]]:
    """The newest complete checkpoint of a run, and the torn ones that were passed over."""
    passed: list[Entry[F]] = []
    for entry in _newest_first(home):
        if entry.manifest is not None:
            return entry, passed
        passed.append(entry)
    return None, passed


def newest_intact(home: F, before: int | None = None, good: bool = False) -> tuple[Entry[F] | None, list[Entry[F]]]:
    """The newest checkpoint whose every byte is as written, and those that were passed over. Collective: the first
    rank looks, and all read.

    With `before`, of those at an earlier step; with `good`, of those that no skipped step came right before.
    """
    found = broadcast_object(lambda: list(_newest_first(home)))
    passed = [entry for entry in found if entry.manifest is None]
    for entry in found:
        manifest = entry.manifest
        if manifest is None or (before is not None and manifest.step >= before) or (good and not manifest.is_good):
            continue
        try:
            verify(entry.folder, manifest)
        except CheckpointError as error:
            passed.append(Entry(entry.folder, None, str(error)))
            continue
        return entry, passed
    return None, passed


def resolve(path: str | Folder) -> Folder:
    """A checkpoint folder, given itself, the run directory, or the `checkpoint.storage` around it."""
    path = _storage_of(path)
    folder = locate(path)
    inside = listing(folder) or {}
    if MANIFEST in inside:
        return folder
    if "checkpoints" in inside:
        newest, passed = latest(folder)
        if newest is not None:
            return newest.folder
        remarks = " ".join(entry.remark for entry in passed)
        raise CheckpointError(f"run directory {folder} has no complete checkpoint. {remarks}".strip())
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

    Raises CheckpointError where the storage does not say what there is; then nothing is removed.
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
