"""Fixtures of the model's tests."""

from pathlib import Path

import pytest

from tests.model.released import Sizes, released_model


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("published") / "aria"
    released_model(Sizes()).save_pretrained(folder)
    return folder
