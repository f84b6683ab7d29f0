"""Where checkpoints lie: a folder of a file system, or a prefix behind an fsspec URL (`s3://bucket/run`)."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from aria_train.errors import CheckpointError, ConfigError


class RemotePath:
    """The part of `pathlib.Path` that checkpoints need, behind an fsspec URL. Folders need not be made there."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            scheme = url.split("://")[0]
            raise ConfigError(
                f"storage of kind {scheme}:// cannot be used: {error}. Install the package that fsspec names for it "
                "(s3fs for s3://, gcsfs for gs://, adlfs for az://), or give a path."
            ) from None

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rpartition('/')[0]}/{name}")

    def open(self, mode: str) -> IO[Any]:
        return cast("IO[Any]", self.fs.open(self.path, mode))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.fs.rm_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise


Folder: TypeAlias = Path | RemotePath


def locate(path: str | Folder) -> Folder:
    """A URL or a path, whichever it is."""
    if isinstance(path, str):
        return RemotePath(path) if "://" in path else Path(path)
    return path


def listing(folder: Folder) -> dict[str, int | None] | None:
    """Name -> bytes of all that lies in a folder (bytes: None where the store does not tell); None if there is none.

    Raises CheckpointError where that cannot be found out. So what is not listed is not there: `exists` and `isdir` of
    most fsspec stores also say no when the store does not answer.
    """
    try:
        if isinstance(folder, RemotePath):
            folder.fs.invalidate_cache()
            found = {entry["name"].rstrip("/"): entry.get("size") for entry in folder.fs.ls(folder.path, detail=True)}
            # Asked about a file, stores list the file itself.
            return {posixpath.basename(path): size for path, size in found.items() if path != folder.path}
        with os.scandir(folder) as inside:
            return {entry.name: _size(entry) for entry in inside}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # What an object store may raise has no common type.
        raise CheckpointError(
            f"{folder} cannot be listed, so what checkpoints there are is not known: {error!s:.300}. Try again once "
            "the storage answers, or mend its permissions."
        ) from None


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return None


def make_folder(folder: Folder) -> None:
    if isinstance(folder, RemotePath):
        folder.fs.makedirs(folder.path, exist_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)


def remove_tree(folder: Folder) -> None:
    """Removes a folder and all in it. Does nothing if there is none, and leaves what it may not remove."""
    if not isinstance(folder, RemotePath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def try_writing(folder: Folder) -> None:
    """Writes a file into a folder, which is made if need be, and removes it. Raises whatever the storage raises."""
    make_folder(folder)
    probe = folder / ".probe"
    write_durably(probe, b"0" * 4096)
    # Whoever may write but not remove can save all the same.
    with contextlib.suppress(Exception):
        probe.unlink()


def write_durably(file: Folder, content: bytes) -> None:
    """Writes a file whose bytes are on disk (or in the store) when this returns."""
    with file.open("wb") as stream:
        stream.write(content)
        if not isinstance(file, RemotePath):
            stream.flush()
            os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder, and the names of new files, durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
