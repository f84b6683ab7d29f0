"""Which learned position each patch of an image takes, whatever the image's aspect ratio."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=256)
def position_ids(rows: int, cols: int, grid: int) -> NDArray[np.int64]:
    """Learned position of every patch of an image of `rows` x `cols` patches: int64 [rows * cols], row-major.

    The released model cuts each axis into `grid` equal buckets and gives patch i of n the bucket of i * (1/n), in
    float32. Rounding moves some patches that sit exactly on a boundary into the bucket before: with grid 70, those of
    images 25, 49, 50 or 55 patches long. The weights were trained so, hence the float arithmetic is reproduced here
    rather than replaced by i * grid // n.
    """
    positions = (_buckets(rows, grid)[:, None] * grid + _buckets(cols, grid)[None, :]).reshape(-1)
    positions.flags.writeable = False  # shared by every caller of the cache
    return positions


@functools.lru_cache(maxsize=4096)
def _buckets(count: int, grid: int) -> NDArray[np.int64]:
    """Bucket of each of `count` patches along one axis: int64 [count]."""
    step = np.float32(1.0) / np.float32(count)
    fractions = np.minimum(np.arange(count, dtype=np.float32) * step, np.float32(1.0 - 1e-6))
    buckets = np.searchsorted(_boundaries(grid), fractions, side="right").astype(np.int64)
    buckets.flags.writeable = False  # shared by every caller of the cache
    return buckets


@functools.lru_cache
def _boundaries(grid: int) -> NDArray[np.float32]:
    """`torch.arange(1 / grid, 1.0, 1 / grid)` to the last bit, which decides on which side of a boundary a patch falls.

    Torch fills whole pairs of 8 lanes as float32(start of the lanes) + lane * step and the rest as start + index *
    step, both in double before the final rounding.
    """
    step = 1.0 / grid
    index = np.arange(max(0, math.ceil((1.0 - step) / step)))
    lane = index % 8
    lane_start = (step + step * (index - lane)).astype(np.float32)
    by_lanes = (lane_start.astype(np.float64) + step * lane).astype(np.float32)
    one_by_one = (step + step * index).astype(np.float32)
    return np.where(index < index.size // 16 * 16, by_lanes, one_by_one)
