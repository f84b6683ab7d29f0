"""Which rows experts on a CPU work on together: few enough to stay in cache, and of equal number where that is cheap.

Below float32, experts that stand next to each other are filled up to as many rows each, so that one batched product
serves them all: up to twice as fast as one product after the other, even with the rows that belong to no token.

Shape legend: T tokens, S (token, expert) pairs sorted by expert, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 20
"""Elements of the widest tensor of the experts that are worked on together."""
_FILLING = 1 << 16
"""Elements of filling per expert that a batch is worth. In float32 it is worth none: a product of few rows runs as fast
as one of many there, and rows that need not be moved are taken where they are."""
_MULTIPLE = 32
"""Below float32 oneDNN prepares a kernel for every number of rows it has not seen lately, which takes longer than the
product itself. So there every expert gets a multiple of this, and there are few such numbers."""


class Batch(NamedTuple):
    """Experts next to each other, one product for all."""

    experts: int
    size: int
    """Rows of each."""

    @property
    def num_rows(self) -> int:
        return self.experts * self.size


@dataclass(frozen=True)
class Group:
    """Batches next to each other that are worked on together."""

    rows: slice
    pairs: slice
    experts: slice
    batches: list[Batch]

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    def cut(self, rows: Tensor) -> list[Tensor]:
        """The group's rows, [rows, width] -> of each batch [experts, size, width]."""
        width = rows.shape[1]
        parts = rows.split([batch.num_rows for batch in self.batches])
        return [part.view(*batch, width) for part, batch in zip(parts, self.batches, strict=True)]

    def share(self, weights: Tensor) -> Sequence[Tensor]:
        """Weights of all experts, [E, ...] -> those of each batch [experts, ...]."""
        return weights[self.experts].split([batch.experts for batch in self.batches])


@dataclass
class Plan:
    """Which rows are worked on together, where they come from and where they go."""

    tokens: Tensor | None
    """int64 [rows]: the token of every row; None where rows are taken as they come."""
    weights: Tensor | None
    """float32 (or wider) [rows], 0 in rows that fill up; None without tokens."""
    places: Tensor | None
    """int64 [S]: the row of each pair, where rows were added that fill up."""
    groups: list[Group]

    @classmethod
    def of(
        cls, tokens_S: Tensor | None, weights_S: Tensor | None, ends_E: Tensor, dtype: torch.dtype, width: int
    ) -> Plan:
        """width: of the widest tensor that is made of a row."""
        precise = torch.promote_types(dtype, torch.float32)
        whole, limit = dtype == precise, max(1, _AT_ONCE // width)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        counts = counts_E.tolist()
        filling, multiple = (0, 1) if whole else (_FILLING // width, _MULTIPLE)
        batches = list(_batches(counts, 0, len(counts), limit, filling, multiple))
        groups = list(_groups(counts, batches, limit))
        if whole:
            return cls(tokens_S, weights_S, None, groups)
        sizes_E = torch.tensor([batch.size for batch in batches for _ in range(batch.experts)])
        shifts_E = (sizes_E.cumsum(0) - sizes_E) - (ends_E - counts_E)
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


def _batches(counts: list[int], first: int, last: int, limit: int, filling: int, multiple: int) -> Iterator[Batch]:
    """The experts from first to last (exclusive) as one batch if their rows are few, and about as many for each; else
    each half for itself."""
    number = last - first
    size = -(-max(counts[first:last]) // multiple) * multiple
    if number == 1 or (number * size <= limit and number * (size - filling) <= sum(counts[first:last])):
        yield Batch(number, size)
        return
    middle = first + number // 2
    yield from _batches(counts, first, middle, limit, filling, multiple)
    yield from _batches(counts, middle, last, limit, filling, multiple)


def _groups(counts: list[int], batches: list[Batch], limit: int) -> Iterator[Group]:
    """As many batches next to each other as stay below the limit."""
    row = pair = expert = 0
    members: list[Batch] = []
    for index, batch in enumerate(batches):
        members.append(batch)
        rows = sum(member.num_rows for member in members)
        if index + 1 == len(batches) or rows + batches[index + 1].num_rows > limit:
            experts = slice(expert, expert + sum(member.experts for member in members))
            pairs = slice(pair, pair + sum(counts[experts]))
            yield Group(slice(row, row + rows), pairs, experts, members)
            row, pair, expert, members = row + rows, pairs.stop, experts.stop, []
