"""Other samples out of the same corpus: those of some length, or many captioned images joined into one long sequence.

A view reads like the corpus it is made of, and is a pure function of it and a few numbers; nothing is copied. Which
samples are in it depends on the lengths of all: like a packing plan, that is found out once and kept on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from aria_train.config import SourceConfig
from aria_train.data.multimodal.store import Placement, Reader, Sample
from aria_train.data.packing import Arrays, cached_arrays
from aria_train.data.permutation import mix_bits
from aria_train.errors import DataError

Ids = NDArray[np.int32]

_VERSION = 1
"""Part of the name of what is kept of a view: raise it when the same corpus would be seen differently."""


class SampleReader(Protocol):
    """What packing and reading need of a corpus; see `multimodal_store.Reader`."""

    folder: Path
    meta: dict[str, Any]

    def __len__(self) -> int: ...

    def lengths(self) -> NDArray[np.int32]: ...

    def length(self, row: int) -> int: ...

    def placements(self, row: int) -> list[Placement]: ...

    def sample(self, row: int) -> Sample: ...


def open_reader(
    source: SourceConfig, folder: Path, context_length: int, seed: int, kept_in: Sequence[Path] = ()
) -> SampleReader:
    """The corpus at `folder` as the source wants it. Raises DataError where it cannot be had so.

    What is found out about all samples is kept in the first of the folders `kept_in` that is writable.
    """
    reader: SampleReader = Reader(folder, kept_in)
    if source.min_tokens is not None or source.max_tokens is not None:
        reader = SelectedReader(reader, source.min_tokens, source.max_tokens, kept_in)
    if source.concatenate is not None:
        reader = ConcatenatedReader(reader, source.concatenate, context_length, seed, kept_in)
    return reader


def chosen(lengths: NDArray[np.integer], min_tokens: int | None, max_tokens: int | None) -> NDArray[np.bool_]:
    """Which documents have at least and at most so many tokens: bool, one per length."""
    return (lengths >= (min_tokens or 0)) & (lengths <= (max_tokens or np.iinfo(np.int64).max))


class SelectedReader:
    """The samples of at least and at most so many tokens."""

    def __init__(
        self, reader: SampleReader, min_tokens: int | None, max_tokens: int | None, kept_in: Sequence[Path] = ()
    ) -> None:
        self.reader, self.folder = reader, reader.folder
        fingerprint = f"{reader.meta['fingerprint']} from {min_tokens} to {max_tokens}"
        parts = [_VERSION, fingerprint]
        found = cached_arrays(kept_in, "view", parts, lambda: self._choose(min_tokens, max_tokens))
        self._rows, self._lengths = found["rows"], found["lengths"]
        self.meta = {**reader.meta, "longest_sample": int(self._lengths.max()), "fingerprint": fingerprint}

    def _choose(self, min_tokens: int | None, max_tokens: int | None) -> Arrays:
        lengths = self.reader.lengths()
        rows = np.flatnonzero(chosen(lengths, min_tokens, max_tokens))
        if not len(rows):
            bounds = f"min_tokens {min_tokens}" if max_tokens is None else f"max_tokens {max_tokens}"
            raise DataError(
                f"{self.folder}: none of its {len(self.reader):,} samples is within {bounds}; the longest has "
                f"{self.reader.meta['longest_sample']:,} tokens. Choose other bounds, or take the source out of the "
                "blend."
            )
        return {"rows": rows, "lengths": lengths[rows]}

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> NDArray[np.int32]:
        return self._lengths

    def length(self, row: int) -> int:
        return int(self._lengths[row])

    def placements(self, row: int) -> list[Placement]:
        return self.reader.placements(int(self._rows[row]))

    def sample(self, row: int) -> Sample:
        return self.reader.sample(int(self._rows[row]))


class ConcatenatedReader:
    """Captioned images joined into long sequences (Aria paper, section 3): N independent images, then their N
    descriptions, one per line, as the target.

    With `count` samples each, or with as many as fit a window (`window`), in a shuffled order that the seed fixes.
    """

    def __init__(
        self,
        reader: SampleReader,
        count: int | Literal["window"],
        context_length: int,
        seed: int,
        kept_in: Sequence[Path] = (),
    ) -> None:
        self.reader, self.folder = reader, reader.folder
        meta = reader.meta
        if meta["format"] != "captions" or "newline_ids" not in meta:
            raise DataError(
                f"{self.folder}: `concatenate` joins captioned images, and this is a corpus of format {meta['format']}"
                + (", prepared before samples could be joined" if meta["format"] == "captions" else "")
                + ". Prepare one with `aria-train data prepare --format captions`."
            )
        self._newline = np.array(meta["newline_ids"], np.int32)
        fingerprint = f"{meta['fingerprint']} joined {count} {context_length} {seed}"
        parts = [_VERSION, fingerprint, len(self._newline)]
        found = cached_arrays(kept_in, "view", parts, lambda: self._join(count, context_length, seed))
        self._order, self._starts, self._lengths = found["order"], found["starts"], found["lengths"]
        self.meta = {
            **meta,
            "divisible": False,
            "longest_sample": int(self._lengths.max()),
            "fingerprint": fingerprint,
        }

    def _join(self, count: int | Literal["window"], context_length: int, seed: int) -> Arrays:
        # What a sample adds to a sequence: its end-of-document token goes, a line break comes.
        added = self.reader.lengths().astype(np.int64) - 1 + len(self._newline)
        order = np.argsort(mix_bits(np.arange(len(added), dtype=np.uint64), seed), kind="stable")
        room = context_length + len(self._newline)
        order = order[added[order] <= room]
        if not len(order):
            raise DataError(f"{self.folder}: none of its samples fits a window of {context_length} tokens.")
        added = added[order]
        starts = _fixed(len(added), count) if count != "window" else _filled(added, room)
        lengths = (np.add.reduceat(added, starts[:-1]) - len(self._newline) + 1).astype(np.int32)
        return {"order": order, "starts": starts, "lengths": lengths}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def lengths(self) -> NDArray[np.int32]:
        return self._lengths

    def length(self, row: int) -> int:
        return int(self._lengths[row])

    def placements(self, row: int) -> list[Placement]:
        return _in_front([self.reader.placements(member) for member in self._members(row)])

    def sample(self, row: int) -> Sample:
        return concatenate([self.reader.sample(member) for member in self._members(row)], self._newline)

    def _members(self, row: int) -> list[int]:
        return self._order[self._starts[row] : self._starts[row + 1]].tolist()


def _fixed(num_samples: int, count: int) -> NDArray[np.int64]:
    return np.append(np.arange(0, num_samples, count), num_samples)


def _filled(added: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Bounds of consecutive runs, each as long as fits the room."""
    ends = np.cumsum(added)
    starts = [0]
    while starts[-1] < len(added):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, before + room, side="right")))
    return np.array(starts, np.int64)


def _in_front(placements: Sequence[list[Placement]]) -> list[Placement]:
    """Where images stand once all are at the beginning, each between its two markers."""
    moved: list[Placement] = []
    for placement in itertools.chain.from_iterable(placements):
        moved.append(Placement(moved[-1].end + 2 if moved else 1, placement.layout))
    return moved


def concatenate(samples: list[Sample], newline: Ids) -> Sample:
    """One sample of captioned images: all images in order, then all texts in order with `newline` between them, and
    the end-of-document token of the last."""
    pictures: list[Ids] = []
    texts: list[Ids] = []
    losses: list[NDArray[np.uint8]] = []
    placements = _in_front([sample.placements for sample in samples])
    for sample in samples:
        is_text = np.ones(len(sample.token_ids), bool)
        is_text[-1] = False
        for placement in sample.placements:
            stretch = slice(placement.start - 1, placement.end + 1)
            is_text[stretch] = False
            pictures.append(sample.token_ids[stretch])
        texts += [sample.token_ids[is_text], newline]
        losses += [sample.loss[is_text], np.ones(len(newline), np.uint8)]
    texts[-1], losses[-1] = samples[-1].token_ids[-1:], samples[-1].loss[-1:]
    others = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
    return Sample(
        token_ids=np.concatenate([*pictures, *texts]),
        loss=np.concatenate([np.zeros(sum(map(len, pictures)), np.uint8), *losses]),
        images=list(itertools.chain.from_iterable(sample.images for sample in samples)),
        placements=placements,
        category="long sequence",
        origin=samples[0].origin + others,
    )
