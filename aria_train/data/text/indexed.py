"""Megatron-core's indexed corpus, `PREFIX.bin` + `PREFIX.idx`, read memory-mapped and written atomically.

`.bin` is the token ids of all sequences end to end. `.idx`, little-endian:

    b"MMIDIDX\\0\\0"   9 bytes    magic
    1                 uint64     version
    code              uint8      dtype of the tokens, see `DTYPES`
    S                 uint64     sequences
    D + 1             uint64     documents plus one
    lengths           int32 [S]  tokens per sequence
    pointers          int64 [S]  byte offset of each sequence in .bin
    document_indices  int64 [D + 1]  first sequence of each document, then S
    modes             int8 [S]   optional, one label per sequence

A document is one or more sequences; empty ones are legal.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aria_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
_HASHED = 2**14
"""Values at either end that a fingerprint takes in."""
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of the format that holds every id of a vocabulary."""
    if vocab_size <= 2**8:
        return DTYPES[1]
    return DTYPES[8] if vocab_size <= 2**16 else DTYPES[4]


def strip_suffix(path: str | Path) -> str:
    """`a/b.idx`, `a/b.bin` and `a/b` all name the corpus with prefix `a/b`."""
    text = str(path)
    return text[:-4] if text.endswith((".idx", ".bin")) else text


def is_index_file(path: Path) -> bool:
    """Whether a file begins as an index does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_metadata(prefix: str) -> dict[str, Any]:
    """What `PREFIX.json` says of a corpus; empty where there is none, or it is another tool's file."""
    try:
        metadata = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


class IndexedCorpus:
    """A corpus opened for reading. Nothing is copied into memory; safe to read from many threads.

    Opening checks the header and that both files have the size they must have; `verify` checks every entry.
    Raises DataError for anything missing, torn, or inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = strip_suffix(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(_describe_missing(self.prefix, path))
        index = _map(self.idx_path)
        self.dtype, num_sequences, num_starts = self._read_header(index)
        offsets = np.cumsum([HEADER_BYTES, 4 * num_sequences, 8 * num_sequences, 8 * num_starts]).tolist()
        self.lengths: NDArray[np.int32] = index[offsets[0] : offsets[1]].view("<i4")
        self.pointers: NDArray[np.int64] = index[offsets[1] : offsets[2]].view("<i8")
        self.document_indices: NDArray[np.int64] = index[offsets[2] : offsets[3]].view("<i8")
        has_modes = num_sequences > 0 and len(index) == offsets[3] + num_sequences
        self.modes: NDArray[np.int8] | None = index[offsets[3] :].view("i1") if has_modes else None
        self.num_sequences, self.num_documents = num_sequences, num_starts - 1
        self._bytes = _map(self.bin_path)
        self._check_ends()

    def _read_header(self, index: NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
        header = index[:HEADER_BYTES].tobytes()
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise DataError(
                f"{self.idx_path}: not an index of a Megatron corpus: it must start with a {HEADER_BYTES}-byte header "
                f"whose first bytes are {MAGIC!r}; found {header[:9]!r} in a file of {len(index)} bytes. "
                "Prepare the corpus again with `aria-train data prepare`, or copy the file again."
            )
        version, code = int.from_bytes(header[9:17], "little"), header[17]
        if version != VERSION or code not in DTYPES:
            known = ", ".join(f"{code} = {dtype.name}" for code, dtype in DTYPES.items())
            raise DataError(
                f"{self.idx_path}: format version {version} with token dtype code {code}; this reads version {VERSION} "
                f"with codes {known}. The file is damaged or from an unknown writer: prepare the corpus again."
            )
        sequences = int.from_bytes(header[18:26], "little")
        starts = int.from_bytes(header[26:34], "little")
        expected = HEADER_BYTES + 12 * sequences + 8 * starts
        if starts < 1 or len(index) not in (expected, expected + sequences):
            raise DataError(
                f"{self.idx_path}: holds {len(index):,} bytes, but its header promises {sequences:,} sequences in "
                f"{starts - 1:,} documents, which take {expected:,} bytes (or {expected + sequences:,} with modes). "
                "The file is truncated or damaged: copy it again or prepare the corpus again."
            )
        return DTYPES[code], sequences, starts

    def _check_ends(self) -> None:
        """What a truncated, stale, or mismatched pair gets wrong, found without reading the whole index."""
        if self.document_indices[0] != 0 or self.document_indices[-1] != self.num_sequences:
            raise DataError(
                f"{self.idx_path}: its documents cover sequences {self.document_indices[0]} to "
                f"{self.document_indices[-1]}, not 0 to {self.num_sequences}. The file is damaged, or its writer "
                "stopped before ending the last document: prepare the corpus again."
            )
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.num_sequences else 0
        if end != len(self._bytes):
            raise DataError(
                f"{self.bin_path}: holds {len(self._bytes):,} bytes, but {self.idx_path.name} says that its "
                f"{self.num_sequences:,} sequences of {self.dtype.name} end at byte {end:,}. One of the two files is "
                "truncated or belongs to another corpus: copy both again or prepare the corpus again."
            )

    def verify(self) -> None:
        """Checks every entry of the index (a pass over `.idx`, not over `.bin`)."""
        step = 1 << 22
        for at in range(0, self.num_sequences, step):
            lengths, pointers = self.lengths[at : at + step], self.pointers[at : at + step]
            ends = pointers + lengths.astype(np.int64) * self.dtype.itemsize
            wrong = np.flatnonzero((lengths < 0) | (pointers < 0) | (ends > len(self._bytes)))
            if len(wrong):
                self._refuse_sequence(at + int(wrong[0]))
        for at in range(0, self.num_documents, step):
            falls = np.flatnonzero(np.diff(self.document_indices[at : at + step + 1]) < 0)
            if len(falls):
                raise DataError(
                    f"{self.idx_path}: document {at + int(falls[0])} ends before it begins. The file is damaged: "
                    "copy it again or prepare the corpus again."
                )

    def _refuse_sequence(self, sequence: int) -> None:
        raise DataError(
            f"{self.idx_path}: sequence {sequence} has {self.lengths[sequence]:,} tokens of {self.dtype.name} at byte "
            f"{self.pointers[sequence]:,}, outside {self.bin_path.name} with its {len(self._bytes):,} bytes. The index "
            "is damaged or belongs to another corpus: copy both files again or prepare the corpus again."
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, as `.bin` holds them."""
        return len(self._bytes) // self.dtype.itemsize

    def fingerprint(self) -> str:
        """A hash of the sizes, and of the beginning and the end of lengths, documents and tokens: the same for a copy,
        and found without reading all."""
        digest = hashlib.sha256(f"{self.dtype} {self.num_sequences} {self.num_documents} {len(self._bytes)}".encode())
        for values in (self.lengths, self.document_indices, self._bytes):
            digest.update(values[:_HASHED].tobytes() + values[-_HASHED:].tobytes())
        return digest.hexdigest()

    def document_lengths(self) -> NDArray[np.int64]:
        """int64 [D]: tokens per document."""
        if self.num_sequences == self.num_documents and bool((np.diff(self.document_indices) == 1).all()):
            return self.lengths.astype(np.int64)
        ends = np.zeros(self.num_sequences + 1, np.int64)
        np.cumsum(self.lengths, out=ends[1:])
        return np.diff(ends[self.document_indices])

    def lengths_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: tokens of these documents."""
        first, behind = self.document_indices[documents], self.document_indices[documents + 1]
        counts = behind - first
        sequences = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        ends = np.append(0, np.cumsum(self.lengths[sequences], dtype=np.int64))
        return np.diff(ends[np.append(0, np.cumsum(counts))])

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray:
        """Tokens `start:stop` of a document, in the corpus's own dtype; a view of the file where possible."""
        first, last = int(self.document_indices[document]), int(self.document_indices[document + 1])
        if last - first == 1:
            return self._read_sequence(first)[start:stop]
        if last <= first:
            return np.empty(0, self.dtype)
        lengths, pointers = self.lengths[first:last].astype(np.int64), self.pointers[first:last]
        if bool((np.diff(pointers) == lengths[:-1] * self.dtype.itemsize).all()):  # End to end, as writers do.
            return self._read_bytes(int(pointers[0]), int(lengths.sum()), first)[start:stop]
        return np.concatenate([self._read_sequence(sequence) for sequence in range(first, last)])[start:stop]

    def _read_sequence(self, sequence: int) -> NDArray:
        return self._read_bytes(int(self.pointers[sequence]), int(self.lengths[sequence]), sequence)

    def _read_bytes(self, begin: int, length: int, sequence: int) -> NDArray:
        end = begin + length * self.dtype.itemsize
        if not 0 <= begin <= end <= len(self._bytes):
            self._refuse_sequence(sequence)
        return self._bytes[begin:end].view(self.dtype)


class IndexedWriter:
    """Writes a corpus that exists only once `finish` has returned; leaving the `with` block on an error discards it.

        with IndexedWriter("data/web", np.uint16) as writer:
            writer.add_document(tokens)
            writer.finish()

    Files grow under temporary names in the same folder; `.idx`, without which nothing opens a corpus, is renamed last.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, with_modes: bool = False) -> None:
        self.prefix = strip_suffix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        assert self.dtype in DTYPES.values(), f"{dtype} is not a dtype of the format"
        self._bounds = np.iinfo(self.dtype) if self.dtype.kind in "iu" else np.finfo(self.dtype)
        self._lengths, self._document_indices = array("i"), array("q", [0])
        self._modes = array("b") if with_modes else None
        self._bin = open(self._partial(".bin"), "wb")  # noqa: SIM115 (closed in finish or discard)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return self._bin.tell() // self.dtype.itemsize

    def add_document(
        self, tokens: Sequence[int] | NDArray, lengths: Sequence[int] | None = None, modes: Sequence[int] | None = None
    ) -> None:
        """Adds a document: its tokens, cut into sequences of `lengths` (default: one), with a mode for each."""
        values = np.asarray(tokens)
        if len(values):
            fits = self._bounds.min <= values.min() <= values.max() <= self._bounds.max
            assert fits, f"token ids {values.min()} to {values.max()} do not fit {self.dtype}"
        lengths = [len(values)] if lengths is None else lengths
        assert sum(lengths) == len(values), f"sequences of {lengths} do not make up {len(values)} tokens"
        self._bin.write(values.astype(self.dtype).tobytes())
        self._lengths.extend(lengths)
        self._document_indices.append(len(self._lengths))
        if self._modes is not None:
            self._modes.extend([0] * len(lengths) if modes is None else modes)

    def add_corpus(self, corpus: IndexedCorpus) -> None:
        """Appends every document of another corpus of the same dtype."""
        assert corpus.dtype == self.dtype, f"{corpus.dtype} is not {self.dtype}"
        first = len(self._lengths)
        self._lengths.frombytes(corpus.lengths.tobytes())
        self._document_indices.frombytes((corpus.document_indices[1:] + first).tobytes())
        if self._modes is not None:
            modes = np.zeros(corpus.num_sequences, np.int8) if corpus.modes is None else corpus.modes
            self._modes.frombytes(modes.tobytes())
        with open(corpus.bin_path, "rb") as part:
            shutil.copyfileobj(part, self._bin, 1 << 22)

    def finish(self) -> None:
        """Writes the index and publishes the pair."""
        _close_durably(self._bin)
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        index = open(self._partial(".idx"), "wb")  # noqa: SIM115
        index.write(MAGIC + VERSION.to_bytes(8, "little") + code.to_bytes(1, "little"))
        index.write(len(lengths).to_bytes(8, "little") + len(self._document_indices).to_bytes(8, "little"))
        index.write(lengths.astype("<i4").tobytes())
        index.write(pointers.astype("<i8").tobytes())
        index.write(np.frombuffer(self._document_indices, np.int64).astype("<i8").tobytes())
        if self._modes is not None:
            index.write(self._modes.tobytes())
        _close_durably(index)
        publish_files({self._partial(suffix): self.prefix + suffix for suffix in (".bin", ".idx")})

    def _partial(self, suffix: str) -> str:
        return f"{self.prefix}{suffix}.{os.getpid()}.partial"

    def discard(self) -> None:
        """Removes what was written, if it was not published."""
        self._bin.close()
        for suffix in (".bin", ".idx"):
            Path(self._partial(suffix)).unlink(missing_ok=True)


def publish_files(renames: Mapping[str, str]) -> None:
    """Renames the finished files of a corpus into place, `.idx` last and the old `.idx` gone before: at every moment
    the corpus is the old one, absent, or the new one."""
    indices = [target for target in renames.values() if target.endswith(".idx")]
    for target in indices:
        Path(target).unlink(missing_ok=True)
    for temporary, target in sorted(renames.items(), key=lambda pair: pair[1] in indices):
        os.replace(temporary, target)


def _close_durably(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _map(path: Path) -> NDArray[np.uint8]:
    """A file's bytes, memory-mapped; an empty file cannot be mapped."""
    try:
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the file's permissions.") from None


def _describe_missing(prefix: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{prefix}: no such corpus: the folder {folder} does not exist. Give the path without .bin or .idx."
    names = sorted(file.stem for file in folder.glob("*.idx"))
    close = difflib.get_close_matches(path.stem, names, n=1)
    known = ", ".join(names[:10]) or "none"
    return (
        f"{prefix}: no such corpus: {path.name} is not in {folder}"
        + (f"; did you mean {folder / close[0]}?" if close else ".")
        + f" A corpus is a pair PREFIX.bin and PREFIX.idx; those in that folder: {known}."
    )
