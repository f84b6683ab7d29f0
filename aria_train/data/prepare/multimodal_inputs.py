"""Records from files for multimodal preparation: JSON lines, a JSON list, Parquet, and datasets saved as Arrow.

Units depend on the files alone and are read independently, so any number of processes finds the same records in the
same order.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from aria_train.data.prepare.text_inputs import Skipped

GLOBS = ("*.jsonl", "*.jsonl.gz", "*.parquet", "*.arrow")
"""What is read of a folder when nothing else is asked for."""

_LINES_PER_UNIT, _BYTES_PER_UNIT = 64, 4 << 20
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time."""

    kind: Literal["lines", "parquet", "arrow", "unreadable"]
    path: str
    first: int
    """Number of the first line or row, as places are reported: lines from 1, rows from 0."""
    num_bytes: int
    """Share of the file's size, for progress."""
    lines: tuple[bytes, ...] = ()
    group: int = 0
    """Row group (Parquet) or record batch (Arrow)."""
    error: str = ""
    """Why the file cannot be read from here on."""


def split_into_units(paths: Sequence[str]) -> Iterator[Unit]:
    """Units of the files, in order."""
    for path in paths:
        try:
            if path.endswith(".parquet"):
                yield from _parquet_units(path)
            elif path.endswith(".arrow"):
                yield from _arrow_units(path)
            elif path.endswith(".json"):
                yield from _list_units(path)
            else:
                yield from _line_units(path)
        except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
            yield Unit("unreadable", path, 0, 0, error=" ".join(str(error).split())[:200])


def read_records(unit: Unit, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]] | Skipped]:
    """(line or row, record) of everything in the unit, and what cannot be used. Of tables only `columns` are read."""
    if unit.kind == "unreadable":
        yield Skipped("unreadable file", unit.path, detail=unit.error)
    elif unit.kind == "lines":
        for number, raw in enumerate(unit.lines, unit.first):
            if raw.strip():
                yield _parse(raw, unit.path, number)
    else:
        try:
            yield from _read_table(unit, columns)
        except (OSError, pa.ArrowException) as error:
            yield Skipped("unreadable file", unit.path, detail=" ".join(str(error).split())[:200])


def _parse(raw: bytes, path: str, line: int) -> tuple[int, dict[str, Any]] | Skipped:
    try:
        record = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", path, line, f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Skipped("invalid JSON", path, line, str(error))
    if not isinstance(record, dict):
        return Skipped("not a JSON object", path, line, f"a {type(record).__name__}")
    return line, record


def _line_units(path: str) -> Iterator[Unit]:
    compressed = path.endswith(".gz")
    with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
        yield from _group_lines(path, file, 0 if compressed else 1)
    if compressed:
        yield Unit("lines", path, 0, os.path.getsize(path))  # for progress alone: lines have no size within the file


def _list_units(path: str) -> Iterator[Unit]:
    with open(path, "rb") as file:
        records = json.load(file)
    if not isinstance(records, list):
        raise ValueError(f"a .json file must hold a list of records, not a {type(records).__name__}")
    yield from _group_lines(path, (json.dumps(record).encode() for record in records), 1)


def _group_lines(path: str, lines: Any, weight: int) -> Iterator[Unit]:
    group: list[bytes] = []
    first = size = 0
    for number, line in enumerate(lines, 1):
        if not group:
            first = number
        group.append(line)
        size += len(line)
        if len(group) == _LINES_PER_UNIT or size >= _BYTES_PER_UNIT:
            yield Unit("lines", path, first, size * weight, tuple(group))
            group, size = [], 0
    if group:
        yield Unit("lines", path, first, size * weight, tuple(group))


def _parquet_units(path: str) -> Iterator[Unit]:
    metadata = pa.parquet.read_metadata(path)
    share = os.path.getsize(path) // max(metadata.num_row_groups, 1)
    row = 0
    for group in range(metadata.num_row_groups):
        yield Unit("parquet", path, row, share, group=group)
        row += metadata.row_group(group).num_rows


def _arrow_units(path: str) -> Iterator[Unit]:
    row = 0
    batches = list(_arrow_batches(path))
    for group, batch in enumerate(batches):
        yield Unit("arrow", path, row, os.path.getsize(path) // len(batches), group=group)
        row += batch.num_rows


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """Record batches of a memory-mapped Arrow file or stream (`datasets` saves streams)."""
    source = pa.memory_map(path)
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        yield from pa.ipc.open_stream(pa.memory_map(path))
    else:
        yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _read_table(unit: Unit, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    row = unit.first
    for batch in _table_batches(unit, columns):
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for record in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                yield row, record
                row += 1


def _table_batches(unit: Unit, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    if unit.kind == "parquet":
        with pa.parquet.ParquetFile(unit.path) as file:
            wanted = _wanted(file.schema_arrow.names, columns)
            yield from file.iter_batches(_ROWS_AT_ONCE, row_groups=[unit.group], columns=wanted, use_threads=False)
    else:
        for number, batch in enumerate(_arrow_batches(unit.path)):
            if number == unit.group:
                yield batch.select(_wanted(batch.schema.names, columns))


def _wanted(names: Sequence[str], columns: Collection[str]) -> list[str]:
    wanted = [name for name in names if name in columns]
    if not wanted:
        raise pa.ArrowInvalid(f"its columns ({', '.join(names[:8])}) have none of {', '.join(sorted(columns))}")
    return wanted
