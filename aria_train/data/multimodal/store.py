"""A prepared multimodal corpus on disk: a folder of Arrow files and `meta.json`.

One row per sample. Token ids already hold every image as a run of image tokens, so that lengths are known and windows
can be packed without decoding; image files are kept as they came, compressed. The Arrow files (IPC file format,
uncompressed) are memory-mapped: a row costs its own bytes, whatever the size of the corpus.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aria_train.data.multimodal.images import ImageLayout
from aria_train.data.packing import Arrays, cached_arrays
from aria_train.errors import DataError

KIND, VERSION = "multimodal", 1
META = "meta.json"
FILES = (META, "samples-*.arrow", "skipped.jsonl", "packing")
"""What a corpus's folder may hold."""

SCHEMA = pa.schema(
    {
        "token_ids": pa.large_list(pa.int32()),
        "loss": pa.large_list(pa.uint8()),
        "images": pa.large_list(pa.large_binary()),
        "placements": pa.large_list(
            pa.struct({name: pa.int32() for name in ("start", "size", "num_queries", "grid_height", "grid_width")})
        ),
        "num_tokens": pa.int32(),
        "num_images": pa.int32(),
        "num_image_tokens": pa.int32(),
        "category": pa.string(),
        "origin": pa.string(),
    }
)
"""`num_images` counts what the encoder sees: a split image counts once per crop."""

_LAYOUT_VERSION = 1
"""Part of the name of what is kept of a corpus: raise it when other things are kept."""
_BATCH_BYTES = 16 << 20
_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Placement:
    """Where an image stands in its sample."""

    start: int
    """Index of its first image token."""
    layout: ImageLayout

    @property
    def end(self) -> int:
        """Index behind its last image token."""
        return self.start + self.layout.num_tokens


@dataclass(frozen=True)
class Sample:
    """One conversation or document. m tokens."""

    token_ids: NDArray[np.int32]
    """[m]"""
    loss: NDArray[np.uint8]
    """[m]: 1 where the token is a prediction target; 0 for image tokens, always."""
    images: list[bytes]
    """Compressed image files in order of appearance."""
    placements: list[Placement]
    """One per image, in order; split crops of an image share its placement."""
    category: str
    """What kind of data it is, such as `captions`."""
    origin: str
    """File and line (or row) it was prepared from."""


class Writer:
    """Writes a folder: Arrow files in order, then meta.json. `close` with what the writer cannot know."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.samples = self.tokens = self.targets = self.images = self.image_tokens = self.longest = 0
        self.largest_token_id = 0
        self._categories: Counter[str] = Counter()
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._rows: list[Sample] = []
        self._bytes = 0

    def add(self, sample: Sample) -> None:
        """Appends a sample."""
        self.samples += 1
        self.tokens += len(sample.token_ids)
        self.targets += int(sample.loss[1:].sum())
        self.images += len(sample.images)
        self.image_tokens += sum(placement.layout.num_tokens for placement in sample.placements)
        self.longest = max(self.longest, len(sample.token_ids))
        self.largest_token_id = max(self.largest_token_id, int(sample.token_ids.max()))
        self._categories[sample.category] += 1
        self._rows.append(sample)
        self._bytes += 5 * len(sample.token_ids) + sum(map(len, sample.images))
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        batch = _to_batch(self._rows)
        if self._file is None:
            name = f"samples-{len(self._shards):05d}.arrow"
            self._shards.append({"file": name, "rows": 0})
            self._sink = pa.OSFile(str(self.folder / name), "wb")
            self._file = pa.ipc.new_file(self._sink, SCHEMA)
        self._file.write_batch(batch)
        self._digest.update(batch.serialize())
        self._shards[-1]["rows"] += len(self._rows)
        self._rows, self._bytes = [], 0
        if self._sink.tell() >= _SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._shards[-1]["bytes"] = self._sink.tell()
            self._sink.close()
            self._file = None

    def close(self, **details: Any) -> dict[str, Any]:
        """Ends the last file and writes meta.json with the counts and `details`; returns what it wrote."""
        self._flush()
        self._end_shard()
        meta = {
            "kind": KIND,
            "version": VERSION,
            **details,
            "samples": self.samples,
            "tokens": self.tokens,
            "targets": self.targets,
            "images": self.images,
            "image_tokens": self.image_tokens,
            "longest_sample": self.longest,
            "largest_token_id": self.largest_token_id,
            "categories": dict(sorted(self._categories.items())),
            "fingerprint": self._digest.hexdigest(),
            "files": self._shards,
        }
        (self.folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return meta

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end_shard()


def _to_batch(rows: list[Sample]) -> pa.RecordBatch:
    placements = [
        [
            {
                "start": placement.start,
                "size": placement.layout.size,
                "num_queries": placement.layout.num_queries,
                "grid_height": placement.layout.grid[0] if placement.layout.grid else 0,
                "grid_width": placement.layout.grid[1] if placement.layout.grid else 0,
            }
            for placement in row.placements
        ]
        for row in rows
    ]
    columns = {
        "token_ids": [row.token_ids for row in rows],
        "loss": [row.loss for row in rows],
        "images": [row.images for row in rows],
        "placements": placements,
        "num_tokens": [len(row.token_ids) for row in rows],
        "num_images": [sum(placement.layout.num_crops for placement in row.placements) for row in rows],
        "num_image_tokens": [sum(placement.layout.num_tokens for placement in row.placements) for row in rows],
        "category": [row.category for row in rows],
        "origin": [row.origin for row in rows],
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


class Reader:
    """A prepared folder, memory-mapped. Safe to read from many threads. Raises DataError for one that is not whole.

    How long samples are and where their images stand is copied out of the files when that is first asked for, and kept
    in the first of the folders `kept_in` that is writable.
    """

    def __init__(self, folder: Path, kept_in: Sequence[Path] = ()) -> None:
        self.folder, self._kept_in = folder, kept_in
        self.meta = _read_meta(folder)
        self._first_rows = np.cumsum([0, *(shard["rows"] for shard in self.meta["files"])]).tolist()
        for shard in self.meta["files"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
                raise DataError(
                    f"{path}: {found}, but {META} beside it says {shard['bytes']:,} bytes. The corpus is incomplete: "
                    "copy the whole folder again, or prepare it again with `aria-train data prepare`."
                )
        self._lock = threading.Lock()
        self._starts: dict[int, NDArray[np.int64]] = {}
        """By shard: rows before each of its batches, and then all. To find them out every batch is looked at, so they
        are kept when the file is let go."""
        # An evicted file stays mapped for as long as anything read from it is in use.
        self._open_shard = functools.lru_cache(maxsize=64)(self._map_shard)
        self._open_batch = functools.lru_cache(maxsize=256)(self._map_batch)

    def __len__(self) -> int:
        return self._first_rows[-1]

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every sample: int32 [samples]."""
        shards = range(len(self.meta["files"]))
        columns = [batch.column("num_tokens").to_numpy() for shard in shards for batch in self._batches(shard)]
        return np.concatenate([np.empty(0, np.int32), *columns])

    def length(self, row: int) -> int:
        """Tokens of sample `row`."""
        return int(self._layout["lengths"][row])

    def placements(self, row: int) -> list[Placement]:
        """The images of sample `row`."""
        ends = self._layout["ends"]
        return _placements(self._layout["placements"][ends[row] : ends[row + 1]])

    def sample(self, row: int) -> Sample:
        """Sample `row`; arrays are read-only views of the file."""
        columns, at = self._find(row)
        return Sample(
            token_ids=columns.token_ids[at],
            loss=columns.loss[at],
            images=columns.images(at),
            placements=columns.placements(at),
            category=columns.category[at].as_py(),
            origin=columns.origin[at].as_py(),
        )

    @functools.cached_property
    def _layout(self) -> Arrays:
        """Of all samples: `lengths` int32 [samples]; `placements` int32 [images, 5] as in the schema, of which those of
        sample n are `ends[n]:ends[n + 1]`. In the files they lie between images, a look-up of some pages each."""
        parts = [_LAYOUT_VERSION, self.meta["fingerprint"]]
        return cached_arrays(self._kept_in, "layout", parts, self._read_layout)

    def _read_layout(self) -> Arrays:
        batches = [batch for shard in range(len(self.meta["files"])) for batch in self._batches(shard)]
        counts = [np.diff(batch.column("placements").offsets.to_numpy()) for batch in batches]
        return {
            "lengths": self.lengths(),
            "ends": np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts])),
            "placements": np.concatenate([np.empty((0, 5), np.int32), *map(_placement_rows, batches)]),
        }

    def _find(self, row: int) -> tuple[_Columns, int]:
        assert 0 <= row < len(self), f"sample {row} of {len(self)}"
        shard = bisect.bisect_right(self._first_rows, row) - 1
        with self._lock:  # Arrow's file reader is not safe to share between threads; the batches it gives are
            if shard not in self._starts:
                self._open_shard(shard)
            starts, local = self._starts[shard], row - self._first_rows[shard]
            number = int(np.searchsorted(starts, local, side="right")) - 1
            return self._open_batch(shard, number), local - int(starts[number])

    def _map_shard(self, shard: int) -> Any:
        path = self.folder / self.meta["files"][shard]["file"]
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.schema != SCHEMA:
                raise DataError(f"{path}: its columns are not those of a prepared corpus. Prepare it again.")
            if shard not in self._starts:
                rows = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
                self._starts[shard] = np.cumsum([0, *rows])
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not readable as Arrow ({error}). Copy or prepare the corpus again.") from None
        return reader

    def _map_batch(self, shard: int, number: int) -> _Columns:
        return _Columns(self._open_shard(shard).get_batch(number))

    def _batches(self, shard: int) -> list[pa.RecordBatch]:
        with self._lock:
            reader = self._open_shard(shard)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    advice = "A multimodal corpus is a folder made by `aria-train data prepare`."
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {advice}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). {advice}") from None
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise DataError(f"{path}: does not describe a multimodal corpus (kind: {KIND}). {advice}")
    if meta.get("version") != VERSION:
        raise DataError(
            f"{path}: version {meta.get('version')} of the format; this program reads version {VERSION}. Prepare the "
            "corpus again."
        )
    return meta


class _Columns:
    """The columns of a batch, to pick rows from: views of the file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.token_ids, self.loss = _Lists(batch.column("token_ids")), _Lists(batch.column("loss"))
        self.category, self.origin = batch.column("category"), batch.column("origin")
        self._images, placements = batch.column("images"), batch.column("placements")
        self._image_ends, self._placement_ends = (c.offsets.to_numpy() for c in (self._images, placements))
        self._placements = _placement_rows(batch)

    def images(self, row: int) -> list[bytes]:
        files = self._images.values
        return [files[at].as_py() for at in range(self._image_ends[row], self._image_ends[row + 1])]

    def placements(self, row: int) -> list[Placement]:
        return _placements(self._placements[self._placement_ends[row] : self._placement_ends[row + 1]])


def _placement_rows(batch: pa.RecordBatch) -> NDArray[np.int32]:
    """int32 [images, 5]: the fields of all placements of a batch."""
    column = batch.column("placements")
    return np.stack([column.values.field(item.name).to_numpy() for item in column.type.value_type], axis=1)


def _placements(rows: NDArray[np.int32]) -> list[Placement]:
    return [
        Placement(start, ImageLayout(size, num_queries, (height, width) if height else None))
        for start, size, num_queries, height, width in rows.tolist()
    ]


class _Lists:
    """A column of lists of numbers."""

    def __init__(self, column: Any) -> None:
        self._ends, self._values = column.offsets.to_numpy(), column.values.to_numpy()

    def __getitem__(self, row: int) -> NDArray[Any]:
        values: NDArray[Any] = self._values[self._ends[row] : self._ends[row + 1]]
        return values
