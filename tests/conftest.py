"""Order of the tests: quick ones first, then those that start processes, then the slow, so that failures show early."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def lateness(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is not None, item.get_closest_marker("distributed") is not None

    items.sort(key=lateness)
