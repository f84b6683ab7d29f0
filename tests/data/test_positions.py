"""Patch positions against the released computation, bit for bit."""

import numpy as np
import pytest
import torch

from aria_train.data.multimodal.positions import position_ids


def released_buckets(count: int, grid: int) -> np.ndarray:
    """One axis of transformers' Idefics3VisionEmbeddings.forward, restated in torch."""
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid)
    fractions = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    return torch.bucketize(torch.clamp(fractions, max=1.0 - 1e-6), boundaries, right=True).numpy()


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 8, 10, 16, 20, 27, 35, 49, 70, 71])
def test_every_count_falls_in_the_released_bucket(grid: int):
    for count in range(1, max(grid, 70) + 1):
        expected = released_buckets(count, grid)
        np.testing.assert_array_equal(position_ids(count, 1, grid), expected * grid)
        np.testing.assert_array_equal(position_ids(1, count, grid), expected)


def test_rows_and_columns_combine_row_major():
    ids = position_ids(3, 2, 70)
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 35, 23 * 70, 23 * 70 + 35, 46 * 70, 46 * 70 + 35]


def test_rounding_quirk_of_the_released_weights_is_kept():
    off = [n for n in range(1, 71) if position_ids(1, n, 70).tolist() != [i * 70 // n for i in range(n)]]
    assert off == [25, 49, 50, 55]
