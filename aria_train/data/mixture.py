"""Which source each window of a run comes from: a pure function of the global window index.

Windows come in blocks of 1000. Source i owns the stretch [c_i, c_i+1) of [0, 1) as long as its share. A block looks up
the points (r + u) / 1000, r = 0 ... 999, in an order that scatters them, so it holds each source floor or ceil of
1000 x share times. The offset u, the same for the whole block, sweeps [0, 1) up and down from block to block by an
irrational step: so the shares come out exact in the long run, also of a source that 1000 windows hold less than once,
and because the step is small, the last part of one block and the first part of the next together still hold each
source 1000 x share times to within one (or at most to 1 + step).

All arithmetic is in integers, shares in units of 2^-32 / 1000.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

BLOCK = 1000
_STRIDE = 617
"""Coprime to BLOCK and near its golden section: cells met one after the other lie far apart."""
_UNIT = 1 << 32
"""Steps of one cell: boundaries of sources are integers in [0, BLOCK * _UNIT]."""
_TURN = 1 << 64
"""One full sweep of the offset, up and down."""
_FEWEST_BLOCKS, _MOST_BLOCKS = 32, 512
"""Blocks of one full sweep. Fewer spread a rare source better, more make the step smaller."""
_GOLDEN = 0x9E3779B9
"""The golden section in units of 2^-32: a sweep of so many blocks and this fraction covers [0, 1) most evenly."""


class Mixture:
    """A blend of sources with the given weights (any positive numbers).

    >>> Mixture([3, 1]).locate(4)
    (0, 3)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert all(weight > 0 for weight in weights), f"weights must be positive, not {weights}"
        exact = [Fraction(weight) for weight in weights]
        total, below, bounds = sum(exact), Fraction(0), [0]
        for weight in exact:
            below += weight
            bounds.append(round(below / total * BLOCK * _UNIT))
        self.bounds = bounds
        self.shares = [float(weight / total) for weight in exact]
        # Two blocks may miss by more than one only where the offset jumps over a source's fractional part.
        fractions = [high - low for low, high in itertools.pairwise(bounds)]
        nearest = min((min(f % _UNIT, -f % _UNIT) / _UNIT for f in fractions if f % _UNIT), default=1.0)
        blocks = min(max(math.ceil(2 / nearest), _FEWEST_BLOCKS), _MOST_BLOCKS)
        self._advance = _TURN * _UNIT // (blocks * _UNIT + _GOLDEN)
        self._cells = np.arange(BLOCK, dtype=np.int64) * _STRIDE % BLOCK * _UNIT
        self._inner = np.array(bounds[1:-1], np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, k): window `index` of the run is the k-th window drawn from that source, both from 0."""
        block, offset = divmod(index, BLOCK)
        sources = self._block(block, offset + 1)
        source = int(sources[offset])
        before = self._count_below(source + 1, block) - self._count_below(source, block)
        return source, before + int((sources[:offset] == source).sum())

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """int64 [stop - start]: the source of every window start:stop."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        blocks = [self._block(block, BLOCK) for block in range(first, last)] or [np.empty(0, np.int64)]
        return np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]

    def count(self, source: int, stop: int) -> int:
        """Windows of a source among the first `stop` of the run."""
        block, offset = divmod(stop, BLOCK)
        whole = self._count_below(source + 1, block) - self._count_below(source, block)
        return whole + int((self._block(block, offset) == source).sum())

    def _block(self, block: int, cells: int) -> NDArray[np.int64]:
        """Sources of the first `cells` windows of a block."""
        points = self._cells[:cells] + self._offset(block)
        return np.searchsorted(self._inner, points, side="right")

    def _offset(self, block: int) -> int:
        """u in [0, _UNIT): a triangle wave over the phase, so that it never jumps."""
        phase = block * self._advance % _TURN
        return (min(phase, _TURN - 1 - phase) * 2) >> 32

    def _count_below(self, bound: int, blocks: int) -> int:
        """Windows of the first `blocks` blocks that belong to sources before boundary `bound`.

        In each block: one for every whole cell, and one more where the offset is below the boundary's own.
        """
        whole, part = divmod(self.bounds[bound], _UNIT)
        # The offset is below `part` exactly when the phase is within part / 2 of a turning point, on either side.
        near = part << 31
        inside = _floor_sum(blocks, _TURN, self._advance, near) - _floor_sum(blocks, _TURN, self._advance, -near)
        return blocks * whole + inside


def _floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """sum of floor((start + step * i) / modulus) for i in [0, count), in O(log modulus) exact steps."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (start // modulus)
        step, start = step % modulus, start % modulus
        top = step * count + start
        if top < modulus:
            break
        # Count lattice points under the line from the other axis: columns become rows.
        count, modulus, step, start = top // modulus, step, modulus, top % modulus
    return total
