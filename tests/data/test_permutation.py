import numpy as np
import pytest

from aria_train.data.permutation import mix_bits, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097])
def test_it_is_a_bijection(size: int) -> None:
    assert sorted(permute(index, size, "key") for index in range(size)) == list(range(size))


def test_keys_give_unrelated_orders() -> None:
    orders = [[permute(index, 1000, key) for index in range(1000)] for key in ("a", "b")]
    assert sum(a == b for a, b in zip(*orders)) < 10
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1


def test_it_looks_random() -> None:
    order = np.array([permute(index, 5000, "key") for index in range(5000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    # Every tenth of the order holds a tenth of every tenth of the values, as a random order would.
    cells = np.histogram2d(np.arange(5000), order, bins=10)[0]
    assert ((cells - 50) ** 2 / 50).sum() < 150


def test_it_reaches_far_without_memory() -> None:
    size = 10**12 + 39
    assert len({permute(index, size, "key") for index in range(100)}) == 100
    assert 0 <= permute(size - 1, size, "key") < size


def test_the_order_is_the_same_on_every_machine() -> None:
    """Data order is part of a run's identity: a change here would change resumed runs."""
    assert [permute(index, 10, "0/web/0") for index in range(10)] == [5, 6, 9, 8, 1, 3, 7, 2, 0, 4]
    mixed = [11848814505497119522, 8236254889521876391, 10665025267137600857]
    assert mix_bits(np.arange(3, dtype=np.uint64), 7).tolist() == mixed
