"""Pseudo-random order without state or memory: a keyed bijection of [0, n), and the bit mixer under it.

Own integer arithmetic, not a library's generator: the order of training data must be the same on every machine and
after every upgrade.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_MASK = (1 << 64) - 1


def mix_bits(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser over `values` offset by a hash of the seed: a bijection of 64-bit numbers."""
    x = values + np.uint64(_hash64(f"mix {seed}"))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: int, size: int, key: str) -> int:
    """Where `index` goes under the pseudo-random permutation of [0, size) that `key` names.

    A Feistel network permutes the next even power of two; walking its cycle until it returns to [0, size) makes that a
    permutation of [0, size) (at most 4 steps on average).
    """
    assert 0 <= index < size, f"{index} is outside [0, {size})"
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys, low = _round_keys(key), (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            x = (right ^ round_key) * 0xBF58476D1CE4E5B9 & _MASK
            x = (x ^ (x >> 29)) * 0x94D049BB133111EB & _MASK
            left, right = right, left ^ (x >> (64 - half))
        index = left << half | right
        if index < size:
            return index


@functools.lru_cache(maxsize=1024)
def _round_keys(key: str) -> tuple[int, ...]:
    return tuple(_hash64(f"{key} round {number}") for number in range(ROUNDS))


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
