"""What the tests of multimodal preparation start from. Other files have a tokenizer or a folder of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aria_train.data.text.tokenizer import train_tokenizer
from tests.data.records import noise, save


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["user\nWhat is in the picture?\nassistant\nA digit, a chart and a cat.\n"] * 20, 400, folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with pictures of many kinds."""
    save(tmp_path / "small.png", 40, 30)
    save(tmp_path / "large.jpg", 300, 200)
    save(tmp_path / "strip.png", 1, 3000)
    noise(20, 20).convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise(20, 20).convert("P").save(tmp_path / "palette.png")
    noise(20, 20).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(tmp_path / "deep.png")
    noise(20, 20).save(tmp_path / "moving.gif", save_all=True, append_images=[noise(20, 20, 1)])
    (tmp_path / "text.png").write_text("not a picture\n")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "torn.png").write_bytes((tmp_path / "small.png").read_bytes()[:300])
    return tmp_path
