"""Packing whole documents into windows: best-fit decreasing, computed once per corpus and kept on disk.

A document of m tokens fills m - 1 positions (each but the last token is an input, each but the first a target). One
that fits a window is never split; a longer one becomes consecutive full windows and a remainder that packs like a
document. Best fit, longest first, leaves far less than 1% of the positions empty on any usual length distribution
(Ding et al., arXiv 2404.10830), so nothing is truncated and next to nothing is wasted.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aria_train.data.permutation import mix_bits

Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")

PLAN_VERSION = 1
"""Part of every cache key: raise it when the same input would be packed differently."""


@dataclass(frozen=True)
class PackingStats:
    """What a plan did with a corpus."""

    documents: int
    without_targets: int
    """Documents of fewer than two tokens: nothing in them can be predicted."""
    cut: int
    """Documents longer than a window."""
    targets: int
    """Positions filled = tokens predicted per epoch."""
    windows: int
    efficiency: float
    """targets / (windows x context length)"""


@dataclass(frozen=True)
class PackingPlan:
    """Window w holds the pieces starts[w]:starts[w + 1]; piece p covers the positions from
    `pieces[p] * context_length` of document `documents[p]`, at most a context length of them."""

    starts: NDArray[np.int64]
    documents: NDArray[np.int64]
    pieces: NDArray[np.int32]
    stats: PackingStats


def plan_documents(document_lengths: NDArray[np.integer], context_length: int, seed: int) -> PackingPlan:
    """Packs documents of the given numbers of tokens into windows of `context_length` positions."""
    positions = np.maximum(np.asarray(document_lengths, np.int64) - 1, 0)
    num_pieces = -(-positions // context_length)
    documents = np.repeat(np.arange(len(positions)), num_pieces)
    first_piece = np.cumsum(num_pieces) - num_pieces
    pieces = (np.arange(len(documents)) - first_piece[documents]).astype(np.int32)
    lengths = np.minimum(positions[documents] - pieces * np.int64(context_length), context_length).astype(np.int32)
    without_targets, cut, targets = int((positions == 0).sum()), int((num_pieces > 1).sum()), int(positions.sum())
    num_documents = len(positions)
    del positions, num_pieces, first_piece  # A corpus may have billions of documents.
    starts, order = pack(lengths, context_length, seed)
    windows = len(starts) - 1
    stats = PackingStats(
        documents=num_documents,
        without_targets=without_targets,
        cut=cut,
        targets=targets,
        windows=windows,
        efficiency=targets / (windows * context_length) if windows else 0.0,
    )
    return PackingPlan(starts, documents[order], pieces[order], stats)


def pack(lengths: NDArray[np.integer], capacity: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit decreasing: items of `lengths` in [1, capacity] into bins of `capacity`, none split.

    Returns `starts` int64 [bins + 1] and `order` int64 [items]: bin b holds the items order[starts[b]:starts[b + 1]].
    Among items of one length the seed decides which goes where.

    All items of one length are placed together: best fit fills the tightest bins first, each with as many as it takes,
    so whole groups of bins with equal room move at once, and the cost depends on distinct lengths, not on items.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return np.zeros(1, np.int64), np.empty(0, np.int64)
    assert 1 <= lengths.min() <= lengths.max() <= capacity, "every item must fit a bin"
    order = np.argsort(mix_bits(np.arange(len(lengths), dtype=np.uint64), seed))
    longest_first = (capacity - lengths[order]).astype(np.uint16 if capacity < 2**16 else np.int64)
    order = order[np.argsort(longest_first, kind="stable")]

    counts = np.bincount(lengths, minlength=capacity + 1)
    present = np.flatnonzero(counts)
    bin_of: NDArray[np.integer] = np.empty(len(lengths), np.int32 if len(lengths) < 2**31 else np.int64)
    open_bins = _OpenBins(capacity, smallest=int(present[0]))
    at = 0
    for length in present[::-1].tolist():
        at = open_bins.place(bin_of, at, int(counts[length]), length)
    assert at == len(lengths)
    by_bin = np.argsort(bin_of, kind="stable")
    starts = np.zeros(open_bins.total + 1, np.int64)
    np.cumsum(np.bincount(bin_of, minlength=open_bins.total), out=starts[1:])
    return starts, order[by_bin]


class _OpenBins:
    """Bins that can still take something, grouped by the room left in them."""

    def __init__(self, capacity: int, smallest: int) -> None:
        self.capacity, self.smallest, self.total = capacity, smallest, 0
        self.groups: list[list[NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]
        self.rooms: list[int] = []
        """Rooms that some bin has, ascending."""

    def place(self, bin_of: NDArray[np.integer], at: int, count: int, length: int) -> int:
        """Puts items at:at + count, all of one length, into the tightest bins, then into new ones."""
        while count:
            tightest = bisect.bisect_left(self.rooms, length)
            if tightest < len(self.rooms):
                room = self.rooms.pop(tightest)
                group, self.groups[room] = self.groups[room], []
                bins = group[0] if len(group) == 1 else np.concatenate(group)
            else:
                room, fresh = self.capacity, -(-count // (self.capacity // length))
                bins = np.arange(self.total, self.total + fresh)
                self.total += fresh
            at, count = self._fill(bin_of, at, count, length, room, bins)
        return at

    def _fill(
        self, bin_of: NDArray[np.integer], at: int, count: int, length: int, room: int, bins: NDArray[np.int64]
    ) -> tuple[int, int]:
        """Fills bins of equal room, one after the other, until they or the items run out."""
        each = room // length
        full, rest = min(divmod(count, each), (len(bins), 0))
        placed = full * each + rest
        bin_of[at : at + placed] = np.repeat(bins[: full + (rest > 0)], each)[:placed]
        self._put(room - each * length, bins[:full])
        if rest:
            self._put(room - rest * length, bins[full : full + 1])
            full += 1
        self._put(room, bins[full:])
        return at + placed, count - placed

    def _put(self, room: int, bins: NDArray[np.int64]) -> None:
        if len(bins) and room >= self.smallest:
            if not self.groups[room]:
                bisect.insort(self.rooms, room)
            self.groups[room].append(bins)


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def cached_plan(folders: Sequence[Path], key: str, build: Callable[[], PackingPlan]) -> PackingPlan:
    """The plan named `key`; see `_cached`."""
    return _cached(folders, key, build, _save_plan, _load_plan)


def cached_arrays(folders: Sequence[Path], kind: str, parts: Sequence[object], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of that kind which follow from `parts`, all that they depend on; see `_cached`."""
    key = f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    return _cached(folders, key, build, _save_arrays, _load_arrays)


def _cached(
    folders: Sequence[Path],
    key: str,
    build: Callable[[], T],
    save: Callable[[T, Path], None],
    load: Callable[[Path], T],
) -> T:
    """What is named `key` from the first of `folders` that has it, else built and kept in the first that is writable.

    What is on disk is complete or absent: it is written aside and renamed. What is damaged is built again. Of several
    processes that want the same one builds while the others wait for it. Without a writable folder it is built in
    memory.
    """
    for folder in folders:
        found = _intact(load, folder / key)
        if found is not None:
            return found
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        except OSError:
            continue
        try:
            with _locked(folder / f".{key}.lock"):
                found = _intact(load, folder / key)
                if found is None:
                    found = build()
                    save(found, workplace)
                    _make_durable(workplace)
                    shutil.rmtree(folder / key, ignore_errors=True)  # damaged
                    _rename(workplace, folder / key)
            kept = _intact(load, folder / key)
            return found if kept is None else kept
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    return build()


def _save_plan(plan: PackingPlan, folder: Path) -> None:
    _save_arrays({name: getattr(plan, name) for name in ("starts", "documents", "pieces")}, folder)
    (folder / "stats.json").write_text(json.dumps(asdict(plan.stats), indent=1))


def _load_plan(folder: Path) -> PackingPlan:
    plan = PackingPlan(**_load_arrays(folder), stats=PackingStats(**json.loads((folder / "stats.json").read_text())))
    if not plan.starts[-1] == len(plan.documents) == len(plan.pieces):
        raise ValueError("files of different plans")
    return plan


def _save_arrays(arrays: Arrays, folder: Path) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _load_arrays(folder: Path) -> Arrays:
    # asarray drops the memmap class, whose slicing is slow, and keeps the mapping.
    return {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in folder.glob("*.npy")}


def _intact(load: Callable[[Path], T], folder: Path) -> T | None:
    """What `load` finds in a folder; None if there is none, or it is damaged."""
    try:
        return load(folder) if folder.is_dir() else None
    except Exception:  # Damaged files raise anything.
        return None


def _make_durable(folder: Path) -> None:
    """Readable by all, and on the disk before it gets its name."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)


def _rename(workplace: Path, target: Path) -> None:
    try:
        workplace.rename(target)
    except OSError:
        # Where locks do not work another process may have been first; its plan is the same.
        if not target.is_dir():
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that dies with its process; on a file system without locks, does nothing."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
