"""Documents from files: JSON lines (plain, .gz, .zst), Parquet, and plain text, cut into units that processes share.

Units depend on the files alone and are read independently, so any number of processes finds the same documents in the
same order. A document that cannot be used becomes a `Skipped` with its reason and place; nothing is dropped silently.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from aria_train.errors import DataError

DEFAULT_GLOBS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.txt", "*.md")
"""What is read of a folder when nothing else is asked for."""
_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_FILES_PER_UNIT = 2000


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time: some text files, a byte range of JSON lines, or row groups of Parquet."""

    kind: Literal["text", "jsonl", "parquet"]
    paths: tuple[str, ...]
    start: int
    """jsonl: first byte of the range; parquet: first row group"""
    stop: int
    """jsonl: end of the range; parquet: end of the row groups"""
    num_bytes: int
    """Size on disk, for progress."""


@dataclass(frozen=True)
class Skipped:
    """A document, or a file, that was not used."""

    reason: str
    path: str
    line: int | None = None
    """Line of a unit of JSON lines, counted from the unit's first; row of a Parquet file, from 0."""
    detail: str = ""


def printable(path: str) -> str:
    """A file name as text that can be written anywhere: bytes of it that are not UTF-8 are spelt out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class LinesRead:
    """Last item of a JSON-lines unit: how many lines it had, by which the next unit of the file counts on."""

    count: int


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def find_inputs(inputs: Sequence[str], globs: Sequence[str] | None) -> list[str]:
    """Files named by paths, folders (searched for `globs`, hidden ones left out) and patterns; each once, in order."""
    found: dict[str, str] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = _search(given, globs or DEFAULT_GLOBS)
            if not files:
                raise DataError(
                    f"{given}: no file in this folder matches {', '.join(globs or DEFAULT_GLOBS)}. Say which to read "
                    "with --glob, such as --glob '*.py'."
                )
        elif path.exists():
            files = [given]
        else:
            files = sorted(file for file in glob.glob(given, recursive=True) if os.path.isfile(file))
            if not files:
                raise DataError(f"{given}: no such file or folder, and no file matches it as a pattern.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _search(folder: str, globs: Sequence[str]) -> list[str]:
    files = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = (name for name in sorted(names) if not name.startswith("."))
        files += [os.path.join(at, name) for name in wanted if any(fnmatch.fnmatch(name, g) for g in globs)]
    return files


def split_into_units(paths: Sequence[str], unit_bytes: int) -> list[Unit]:
    """Cuts files into units of about `unit_bytes`, in order. Compressed files are one unit each."""
    units: list[Unit] = []
    texts: list[str] = []
    size_of_texts = 0

    def flush() -> None:
        nonlocal texts, size_of_texts
        if texts:
            units.append(Unit("text", tuple(texts), 0, 0, size_of_texts))
        texts, size_of_texts = [], 0

    for path in paths:
        size = size_of(path)
        kind = _kind(path)
        if kind == "text":
            texts.append(path)
            size_of_texts += size
            if size_of_texts >= unit_bytes or len(texts) == _FILES_PER_UNIT:
                flush()
            continue
        flush()
        if kind == "parquet":
            units += _split_parquet(path, unit_bytes)
        elif path.endswith(".jsonl"):
            starts = range(0, max(size, 1), unit_bytes)
            ranges = ((start, min(start + unit_bytes, size)) for start in starts)
            units += [Unit("jsonl", (path,), start, stop, stop - start) for start, stop in ranges]
        else:
            units.append(Unit("jsonl", (path,), 0, 0, size))
    flush()
    return units


def _kind(path: str) -> Literal["text", "jsonl", "parquet"]:
    if path.endswith(".zst"):
        _zstandard(path)
    if path.endswith(_JSON_SUFFIXES):
        return "jsonl"
    return "parquet" if path.endswith(".parquet") else "text"


def _split_parquet(path: str, unit_bytes: int) -> list[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException):
        return [Unit("parquet", (path,), 0, 0, size_of(path))]  # Reading it will say why.
    units, start, size = [], 0, 0
    share = size_of(path) / max(metadata.num_row_groups, 1)
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            units.append(Unit("parquet", (path,), start, group + 1, int(share * (group + 1 - start))))
            start, size = group + 1, 0
    return units


def size_of(path: str) -> int:
    """Bytes of a file; 0 if it cannot be looked at, which reading it will report."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_documents(unit: Unit, text_key: str) -> Iterator[str | Skipped | LinesRead]:
    """The documents of a unit, none of them empty, and what was skipped, in order."""
    if unit.kind == "text":
        for path in unit.paths:
            yield _read_text(path)
    elif unit.kind == "jsonl":
        yield from _read_json_lines(unit, text_key)
    else:
        yield from _read_parquet(unit, text_key)


def _read_text(path: str) -> str | Skipped:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        return Skipped("unreadable file", path, detail=error.strerror or str(error))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", path, detail=f"byte {error.start}")
    return _checked(text, path, None)


def _read_json_lines(unit: Unit, text_key: str) -> Iterator[str | Skipped | LinesRead]:
    path, line = unit.paths[0], 0
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.endswith(".zst"):
        damaged = (*damaged, _zstandard(path).ZstdError)
    try:
        with _open_lines(unit) as file:
            while not unit.stop or file.tell() < unit.stop:
                raw = file.readline()
                if not raw:
                    break
                line += 1
                if raw.strip():
                    yield _read_json_line(raw, path, line, text_key)
    except damaged as error:
        yield Skipped("unreadable file", path, line + 1, f"read up to here: {error}")
    yield LinesRead(line)


def _open_lines(unit: Unit) -> BinaryIO:
    """The file at the first line that begins in the unit's range."""
    path = unit.paths[0]
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(path))
    file: Any = open(path, "rb", buffering=1 << 20)  # noqa: SIM115
    if path.endswith(".zst"):
        file = io.BufferedReader(_zstandard(path).ZstdDecompressor().stream_reader(file, read_across_frames=True))
    elif unit.start:
        file.seek(unit.start - 1)
        file.readline()
    reader: BinaryIO = file
    return reader


def _zstandard(path: str) -> Any:
    """The optional package that reads .zst."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise DataError(
            f"{path}: reading .zst files needs the zstandard package: `pip install zstandard`, or decompress first."
        ) from None


def _read_json_line(raw: bytes, path: str, line: int, text_key: str) -> str | Skipped:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", path, line, f"byte {error.start} of the line")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Skipped("invalid JSON", path, line, str(error))
    if not isinstance(record, dict):
        return Skipped("not a JSON object", path, line, f"a {type(record).__name__}")
    if text_key not in record:
        return Skipped(f"no key {text_key!r}", path, line, f"keys: {', '.join(list(record)[:8]) or 'none'}")
    return _checked(record[text_key], path, line)


def _read_parquet(unit: Unit, text_key: str) -> Iterator[str | Skipped]:
    import pyarrow
    import pyarrow.parquet

    path = unit.paths[0]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names[:8])
                yield Skipped(f"no column {text_key!r}", path, detail=f"columns: {names}")
                return
            row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
            groups = list(range(unit.start, unit.stop))
            for batch in file.iter_batches(1024, row_groups=groups, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    yield _read_value(value, path, row)
                    row += 1
    except (OSError, pyarrow.ArrowException) as error:
        yield Skipped("unreadable file", path, detail=str(error).splitlines()[0])


def _read_value(value: Any, path: str, row: int) -> str | Skipped:
    try:
        return _checked(value.as_py(), path, row)
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", path, row, f"byte {error.start} of the text")


def _checked(value: Any, path: str, line: int | None) -> str | Skipped:
    if not isinstance(value, str):
        return Skipped("text is not a string", path, line, f"a {type(value).__name__}")
    if not value.strip():
        return Skipped("empty document", path, line)
    try:
        value.encode()
    except UnicodeEncodeError:
        return Skipped("not UTF-8", path, line, "a lone surrogate")
    return value
