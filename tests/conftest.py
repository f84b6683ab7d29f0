"""Order of the tests: quick ones first, then those that start processes, then the slow, so that failures show early."""

import pytest

from aria_train.parallel import shard

shard.SMALLEST_UNIT = 0  # the models here are tiny, and laid out like large ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def lateness(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is not None, item.get_closest_marker("distributed") is not None

    items.sort(key=lateness)
