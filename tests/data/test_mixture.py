import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_train.data.mixture import BLOCK, Mixture, _floor_sum

BLENDS = {
    "one": [1.0],
    "thirds": [1.0, 1.0, 1.0],
    "a third": [1 / 3, 2 / 3],
    "rare": [0.9996, 0.0004],
    "ten": [10, 9, 8, 7, 6, 5, 4, 3, 2, 1],
    "ten tenths": [0.1] * 10,
    "ten with rare ones": [0.0004, 0.3, 0.2, 0.1, 0.0996, 0.1, 0.0501, 0.0499, 0.08, 0.02],
    "steep": [10.0**-power for power in range(8)],
    "tokens": [1e12, 190e9, 102e9, 70e9, 35e9],
}
WINDOWS = 200_000


def prefix_counts(mixture: Mixture, stop: int) -> np.ndarray:
    """int64 [sources, stop + 1]: windows of each source among the first n."""
    drawn = mixture.sources(0, stop) == np.arange(len(mixture.shares))[:, None]
    return np.concatenate([np.zeros((len(drawn), 1), np.int64), np.cumsum(drawn, axis=1)], axis=1)


@pytest.mark.parametrize("weights", BLENDS.values(), ids=BLENDS)
def test_any_thousand_windows_hold_each_source_by_its_share(weights: list[float]) -> None:
    mixture = Mixture(weights)
    counts, shares = prefix_counts(mixture, WINDOWS), np.array(mixture.shares)[:, None]
    np.testing.assert_allclose(mixture.shares, np.array(weights) / sum(weights), rtol=1e-12)
    sliding = counts[:, BLOCK:] - counts[:, :-BLOCK]
    assert np.abs(sliding[:, ::BLOCK] - BLOCK * shares).max() < 1
    assert np.abs(sliding - BLOCK * shares).max() <= 1 + 1 / 256
    assert np.abs(sliding - np.round(BLOCK * shares)).max() <= 1


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=10))
@settings(max_examples=40, deadline=None)
def test_whatever_the_weights(weights: list[float]) -> None:
    mixture = Mixture(weights)
    counts, shares = prefix_counts(mixture, 30 * BLOCK), np.array(mixture.shares)[:, None]
    assert np.abs(counts[:, BLOCK:] - counts[:, :-BLOCK] - BLOCK * shares).max() <= 1 + 1 / 256


@pytest.mark.parametrize("weights", BLENDS.values(), ids=BLENDS)
def test_in_the_long_run_the_shares_are_exact(weights: list[float]) -> None:
    mixture = Mixture(weights)
    stop = 10**11
    counts = np.array([mixture.count(source, stop) for source in range(len(weights))])
    assert counts.sum() == stop
    assert np.abs(counts - stop * np.array(mixture.shares)).max() < 30


@pytest.mark.parametrize("weights", BLENDS.values(), ids=BLENDS)
def test_a_window_knows_its_number_within_its_source(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources, counts = mixture.sources(0, 5000), prefix_counts(mixture, 5000)
    for index in [*range(0, 5000, 37), 999, 1000, 1001, 4999]:
        source = int(sources[index])
        assert mixture.locate(index) == (source, counts[source, index])


def test_numbers_within_a_source_go_on_without_gaps_far_out() -> None:
    mixture = Mixture(BLENDS["ten"])
    start = 123_456_789_500
    numbers: dict[int, list[int]] = {}
    for index in range(start, start + 1500):
        source, number = mixture.locate(index)
        numbers.setdefault(source, []).append(number)
    assert mixture.sources(start, start + 1500).tolist() == [mixture.locate(i)[0] for i in range(start, start + 1500)]
    for source, found in numbers.items():
        assert found == list(range(mixture.count(source, start), mixture.count(source, start + 1500)))


def test_sources_are_scattered_not_in_runs() -> None:
    sources = Mixture([1.0, 1.0]).sources(0, 10_000).tolist()
    assert max(len(list(run)) for _, run in itertools.groupby(sources)) <= 3


def test_short_runs_see_every_larger_source() -> None:
    counts = np.bincount(Mixture(BLENDS["ten"]).sources(0, 100), minlength=10)
    assert np.abs(counts - np.arange(10, 0, -1) / 55 * 100).max() < 3


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 200), st.integers(-200, 200))
@settings(deadline=None)
def test_floor_sum(count: int, modulus: int, step: int, start: int) -> None:
    assert _floor_sum(count, modulus, step, start) == sum((start + step * i) // modulus for i in range(count))


def test_the_order_is_the_same_on_every_machine() -> None:
    """Data order is part of a run's identity: a change here would change resumed runs."""
    assert Mixture([0.5, 0.3, 0.2]).sources(990, 1010).tolist() == [
        2, 0, 0, 1, 0, 2, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 2, 1,
    ]  # fmt: skip
