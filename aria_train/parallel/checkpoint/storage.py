"""Where checkpoints lie: a folder of a file system, or a prefix behind an fsspec URL (`s3://bucket/run`)."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from aria_train.errors import ConfigError


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

    def exists(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.isdir(self.path))

    def iterdir(self) -> Iterator[RemotePath]:
        self.fs.invalidate_cache()
        return (self / posixpath.basename(path.rstrip("/")) for path in self.fs.ls(self.path, detail=False))

    def open(self, mode: str) -> IO[Any]:
        return cast("IO[Any]", self.fs.open(self.path, mode))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists():
            self.fs.rm_file(self.path)


Folder: TypeAlias = Path | RemotePath


def locate(path: str | Folder) -> Folder:
    """A URL or a path, whichever it is."""
    if isinstance(path, str):
        return RemotePath(path) if "://" in path else Path(path)
    return path


def size_of(file: Folder) -> int | None:
    """Bytes in a file; None if there is no such file."""
    if isinstance(file, RemotePath):
        file.fs.invalidate_cache()
        return int(file.fs.size(file.path)) if file.fs.isfile(file.path) else None
    return file.stat().st_size if file.is_file() else None


def make_folder(folder: Folder) -> None:
    if isinstance(folder, RemotePath):
        folder.fs.makedirs(folder.path, exist_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)


def remove_tree(folder: Folder) -> None:
    """Removes a folder and all in it. Does nothing if there is none, and leaves what it may not remove."""
    if not isinstance(folder, RemotePath):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


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
