"""Which rows experts on a CPU work on together: few enough to stay in cache, and of equal number where that is cheap.

Experts with about as many rows are filled up to as many each, so that one batched product serves them all, faster than
one product after the other even with the rows that belong to no token. A batched product takes experts at any distance
from each other, but the same one from each to the next: below float32, experts that stand side by side, whose numbers
may differ widely (fewer rows more take no time there); in float32, two of any, the most alike.

Shape legend: T tokens, S (token, expert) pairs sorted by expert, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 20
"""Elements of the widest tensor of the experts that are worked on together."""
_FILLING = 1 << 16
"""Below float32: elements of filling per expert that a batch is worth."""
_MULTIPLE = 32
"""Below float32 oneDNN prepares a kernel for every number of rows it has not seen lately, which takes longer than the
product itself. So there every expert gets a multiple of this, and there are few such numbers."""
_FEW = 512
"""In float32: rows per expert (mean) up to which two are faster together than one after the other."""
_ALIKE = 0.875
"""In float32: the rows of the expert with fewer that a pair is worth, of the rows of that with more."""


class Batch(NamedTuple):
    """Experts that one product serves."""

    experts: slice
    number: int
    size: int
    """Rows of each."""

    @property
    def num_rows(self) -> int:
        return self.number * self.size


@dataclass(frozen=True)
class Group:
    """Batches that are worked on together; their rows lie next to each other."""

    rows: slice
    pairs: slice
    """Those of the rows, where experts are in order: they always are without weights."""
    batches: list[Batch]

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    def cut(self, rows: Tensor) -> list[Tensor]:
        """The group's rows, [rows, width] -> of each batch [experts, size, width]."""
        width = rows.shape[1]
        parts = rows.split([batch.num_rows for batch in self.batches])
        return [part.view(batch.number, batch.size, width) for part, batch in zip(parts, self.batches, strict=True)]

    def share(self, weights: Tensor) -> list[Tensor]:
        """Weights of all experts, [E, ...] -> those of each batch [experts, ...], where they are."""
        return [weights[batch.experts] for batch in self.batches]


@dataclass
class Plan:
    """Which rows are worked on together, where they come from and where they go."""

    tokens: Tensor | None
    """int64 [rows]: the token of every row (without weights: its pair; 0 in rows that fill up); None where rows are
    taken as they come."""
    weights: Tensor | None
    """float32 (or wider) [rows], 0 in rows that fill up; None without tokens."""
    places: Tensor | None
    """int64 [S]: the row of each pair, where rows were moved."""
    groups: list[Group]

    @classmethod
    def of(
        cls, tokens_S: Tensor | None, weights_S: Tensor | None, ends_E: Tensor, dtype: torch.dtype, width: int
    ) -> Plan:
        """width: of the widest tensor that is made of a row."""
        precise = torch.promote_types(dtype, torch.float32)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        counts, limit = counts_E.tolist(), max(1, _AT_ONCE // width)
        if dtype != precise:
            batches = list(_neighbours(counts, 0, len(counts), limit, _FILLING // width))
        elif tokens_S is not None and sum(counts) <= _FEW * len(counts):
            batches = list(_pairs(counts, limit))
        else:
            batches = _alone(counts)
        groups = list(_groups(counts, batches, limit))
        if batches == _alone(counts):
            return cls(tokens_S, weights_S, None, groups)
        shifts_E = torch.tensor(_starts(batches)) - (ends_E - counts_E)
        pairs = torch.arange(sum(counts))
        places = pairs + shifts_E.repeat_interleave(counts_E, output_size=len(pairs))
        tokens = places.new_zeros(groups[-1].rows.stop)
        tokens.index_copy_(0, places, pairs if tokens_S is None else tokens_S)
        weights = None
        if weights_S is not None:
            weights = torch.zeros(len(tokens), dtype=precise).index_copy_(0, places, weights_S.to(precise))
        return cls(tokens, weights, places, groups)

    @property
    def largest(self) -> int:
        """Rows of the largest group."""
        return max(group.num_rows for group in self.groups)

    @property
    def num_rows(self) -> int:
        return self.groups[-1].rows.stop

    def room_for(self, x: Tensor) -> Tensor:
        """What `put` puts rows into: sums are taken in float32 or wider."""
        if self.weights is None:
            return torch.empty_like(x)
        return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))

    def gather(self, x: Tensor, group: Group, into: Tensor, blank: bool = False) -> Tensor:
        """The group's rows of x, perhaps in `into`. Rows that fill up are zero with `blank`, and anything without."""
        if self.tokens is None:
            return x[group.rows]
        torch.index_select(x, 0, self.tokens[group.rows], out=into)
        if blank and self.weights is None and self.places is not None:
            filled = torch.ones(len(into), dtype=torch.bool)
            filled.index_fill_(0, self.places[group.pairs] - group.rows.start, False)
            into.index_fill_(0, filled.nonzero().squeeze(1), 0)
        return into

    def put(self, out: Tensor, rows: Tensor, group: Group) -> None:
        """Adds rows up where their tokens are; without weights every row has a place of its own."""
        if self.weights is not None and self.tokens is not None:
            out.index_add_(0, self.tokens[group.rows], rows.to(out.dtype))
        elif self.places is None:
            out[group.rows] = rows
        else:
            torch.index_select(rows, 0, self.places[group.pairs] - group.rows.start, out=out[group.pairs])

    def scales(self, group: Group, dtype: torch.dtype) -> Tensor:
        """Weights of the group's rows, to multiply with: [rows, 1]."""
        assert self.weights is not None
        return self.weights[group.rows].to(dtype).unsqueeze(1)

    def of_pairs(self, rows: Tensor) -> Tensor:
        """What stands in the rows of pairs."""
        return rows if self.places is None else rows.index_select(0, self.places)


def _alone(counts: list[int]) -> list[Batch]:
    """Every expert for itself, one after the other."""
    return [Batch(slice(expert, expert + 1), 1, count) for expert, count in enumerate(counts)]


def _pairs(counts: list[int], limit: int) -> Iterator[Batch]:
    """Two experts each, wherever they stand, if their rows are few, and about as many for both."""
    waiting: int | None = None
    for expert in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        if waiting is None:
            waiting = expert
        elif counts[expert] >= _ALIKE * counts[waiting] and 2 * counts[waiting] <= limit:
            first, last = sorted((waiting, expert))
            yield Batch(slice(first, last + 1, last - first), 2, counts[waiting])
            waiting = None
        else:
            yield Batch(slice(waiting, waiting + 1), 1, counts[waiting])
            waiting = expert
    if waiting is not None:
        yield Batch(slice(waiting, waiting + 1), 1, counts[waiting])


def _neighbours(counts: list[int], first: int, last: int, limit: int, filling: int) -> Iterator[Batch]:
    """The experts from first to last (exclusive) as one batch if their rows are few, and about as many for each; else
    each half for itself."""
    number = last - first
    size = -(-max(counts[first:last]) // _MULTIPLE) * _MULTIPLE
    if number == 1 or (number * size <= limit and number * (size - filling) <= sum(counts[first:last])):
        yield Batch(slice(first, last), number, size)
        return
    middle = first + number // 2
    yield from _neighbours(counts, first, middle, limit, filling)
    yield from _neighbours(counts, middle, last, limit, filling)


def _starts(batches: list[Batch]) -> list[int]:
    """The first row of each expert, when rows lie in the order of the batches."""
    experts = range(max(batch.experts.stop for batch in batches))
    starts, row = [0] * len(experts), 0
    for batch in batches:
        for expert in experts[batch.experts]:
            starts[expert] = row
            row += batch.size
    return starts


def _groups(counts: list[int], batches: list[Batch], limit: int) -> Iterator[Group]:
    """As many batches one after the other as stay below the limit."""
    row = pair = rows = pairs = 0
    members: list[Batch] = []
    for batch in batches:
        if members and rows + batch.num_rows > limit:
            yield Group(slice(row, row + rows), slice(pair, pair + pairs), members)
            row, pair, rows, pairs, members = row + rows, pair + pairs, 0, 0, []
        members.append(batch)
        rows += batch.num_rows
        pairs += sum(counts[batch.experts])
    yield Group(slice(row, row + rows), slice(pair, pair + pairs), members)
