"""Writing a checkpoint so that it is complete or invisible.

On a file system it is written as `step_00000100.writing`; when every rank's bytes are on disk the manifest follows,
and one rename publishes it. A store behind a URL has no renames: there the manifest, written last and in one piece,
is what makes the folder a checkpoint. A process that dies at any moment leaves something that nothing reads.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from aria_train.errors import CheckpointError
from aria_train.parallel.checkpoint.manifest import MANIFEST, Manifest, encode
from aria_train.parallel.checkpoint.reading import INDEX, fingerprint
from aria_train.parallel.checkpoint.storage import (
    Folder,
    RemotePath,
    make_folder,
    remove_tree,
    sync_folder,
    write_durably,
)
from aria_train.parallel.collectives import gather_objects

WRITING, REMOVING = ".writing", ".removing"

_LITTLE = 2**24
"""Bytes that may be left of a full file system."""
_COPY_AHEAD = 0
"""Bytes that DCP copies from a GPU while it writes. What is saved is on the host already; with more, its thread would
wait for the training's stream again and again."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written, for a reason outside this program; what was there before still is."""


def save(
    target: Folder, tensors: Mapping[str, Tensor], manifest: Manifest, group: dist.ProcessGroup | None = None
) -> None:
    """Writes a checkpoint from all ranks of a group together, and publishes it. Collective.

    Raises SaveFailed, on all ranks alike, if any of them cannot write; then nothing new is left behind.
    """
    is_first = dist.get_rank(group) == 0
    writing = _writing_folder(target)
    files: dict[str, dict[str, int]] = {}

    def prepare() -> None:
        if is_first:
            discard(writing)
            make_folder(writing)

    def write() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), storage_writer=_writer(writing), process_group=group)

    def read_back() -> None:
        # Still in the page cache; together the ranks cover every file once.
        for name in (f"__{dist.get_rank(group)}_0.distcp", *([INDEX] if is_first else [])):
            # A rank that holds no part of any tensor writes no file.
            with contextlib.suppress(FileNotFoundError):
                files[name] = fingerprint(writing / name)

    def publish() -> None:
        if is_first:
            manifest.files = {name: entry for part in everyones for name, entry in sorted(part.items())}
            _publish(writing, target, manifest)

    _together(prepare, writing, target, group)
    _together(write, writing, target, group)
    _together(read_back, writing, target, group)
    everyones = gather_objects(files, group)
    _together(publish, writing, target, group)


def _together(phase: Callable[[], None], writing: Folder, target: Folder, group: dist.ProcessGroup | None) -> None:
    """Runs one phase on every rank, and fails on all of them if it fails on one."""
    problem: str | None = None
    try:
        phase()
    except dcp.CheckpointException as error:
        problem = "; ".join(f"rank {rank}: {failure!s:.300}" for rank, (failure, _) in sorted(error.failures.items()))
    except Exception as error:  # What a file system or an object store may raise has no common type.
        problem = f"rank {dist.get_rank(group)}: {error!s:.300}"
    if problem and _is_full(writing):
        problem = f"no space left on device: {problem}"
    problems = [report for report in gather_objects(problem, group) if report]
    if problems:
        if dist.get_rank(group) == 0:
            with contextlib.suppress(Exception):
                discard(writing)
        raise SaveFailed(
            f"{target} could not be written: {problems[0]}. Earlier checkpoints are untouched; free space or mend the "
            "permissions."
        )


def _is_full(folder: Folder) -> bool:
    """Whether a file system has no space left: what writes tensors does not say so."""
    with contextlib.suppress(OSError):
        if isinstance(folder, Path):
            return shutil.disk_usage(folder).free < _LITTLE
    return False


def save_alone(target: Path, write: Callable[[Path], None], manifest: Manifest) -> None:
    """One process writes and publishes a checkpoint whose data files `write` puts into the folder it is given."""
    if target.exists():
        raise CheckpointError(f"{target} already exists. Give a new folder.")
    writing = target.with_name(target.name + WRITING)
    remove_tree(writing)
    try:
        writing.mkdir(parents=True)
        write(writing)
        manifest.files = {path.name: fingerprint(path) for path in sorted(writing.iterdir())}
        _publish(writing, target, manifest)
    except BaseException:
        remove_tree(writing)
        raise


def _writing_folder(target: Folder) -> Folder:
    return target if isinstance(target, RemotePath) else target.with_name(target.name + WRITING)


def _writer(folder: Folder) -> dcp.FileSystemWriter:
    if isinstance(folder, RemotePath):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # slow to import

        return FsspecWriter(folder.url, sync_files=False, per_thread_copy_ahead=_COPY_AHEAD)
    return dcp.FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=_COPY_AHEAD)


def _publish(writing: Folder, target: Folder, manifest: Manifest) -> None:
    """The manifest, then the rename that makes the checkpoint visible."""
    write_durably(writing / MANIFEST, encode(manifest))
    if isinstance(writing, Path) and isinstance(target, Path):
        sync_folder(writing)
        discard(target)
        writing.rename(target)
        sync_folder(target.parent)


def discard(folder: Folder) -> None:
    """Removes a folder, if it is there. It is renamed first or, in a store, its manifest goes first: what a kill leaves
    half removed is no checkpoint, and known as such."""
    if isinstance(folder, RemotePath):
        (folder / MANIFEST).unlink(missing_ok=True)
    elif not folder.name.endswith((WRITING, REMOVING)):
        going = folder.with_name(folder.name + REMOVING)
        remove_tree(going)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(going)
        folder = going
    remove_tree(folder)
