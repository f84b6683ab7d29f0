"""The demo's images: drawn from real data, the same for the same seed, and taken whole by the preparation."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aria_train.config import ModelConfig, VisionConfig
from aria_train.data.multimodal.formats import Encoder, Recipe
from aria_train.data.text.tokenizer import train_tokenizer
from demo.images import FORMATS, LARGE, SMALL, Digits, chart_canvas, charts, draw_chart, make_all

SCALE = 0.02
SOURCE = '"""Says what a module is for, shortly."""\ndef f():\n    """Return the number of things."""\n'
KINDS = {"digits", "digits_validation", "captions", "interleaved", "pages", "charts"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "python.jsonl").write_text(json.dumps({"path": "a.py", "text": SOURCE}) + "\n")
    counts = make_all(folder / "python.jsonl", folder / "raw", scale=SCALE)
    assert counts == {
        "digits": 60, "digits_validation": 299, "captions": 100, "interleaved": 10, "pages": 2, "charts": 10
    }  # fmt: skip
    return folder


def records(folder: Path, kind: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "raw" / kind / "samples.jsonl").read_text().splitlines()]


def test_the_same_seed_makes_the_same_files(made: Path, tmp_path: Path) -> None:
    make_all(made / "python.jsonl", tmp_path / "raw", scale=SCALE)
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.*"))]
    assert {path.parts[1] for path in files} == KINDS
    for path in files:
        assert (tmp_path / path).read_bytes() == (made / path).read_bytes(), path


def test_what_is_there_is_not_made_again(made: Path) -> None:
    assert make_all(made / "python.jsonl", made / "raw", scale=SCALE) == {}


def test_held_out_digits_are_other_samples_and_as_they_are() -> None:
    digits = Digits()
    assert set(digits.train).isdisjoint(digits.held_out)
    assert len(digits.train) + len(digits.held_out) == len(digits.values) == 1797
    assert digits.draw(1600) == digits.draw(1600)
    assert digits.draw(1600, random.Random(1)) != digits.draw(1600, random.Random(2))


def test_digits_keep_their_answers(made: Path) -> None:
    digits = Digits()
    answers = [int(record["messages"][1]["content"]) for record in records(made, "digits_validation")]
    assert answers == [digits.values[index] for index in digits.held_out]
    first = Image.open(made / "raw" / "digits_validation" / "images" / "00000.png")
    assert np.array_equal(np.asarray(first), np.asarray(digits.draw(digits.held_out[0])))


def test_a_chart_shows_its_table() -> None:
    table = {"A": 3, "H": 9, "C": 1, "D": 6}
    image = draw_chart(chart_canvas(), table, "#444444")
    assert image.size == (LARGE, LARGE)
    dark = np.asarray(image.convert("L"))[:, LARGE // 5 :] < 110
    dark = dark[: int(0.86 * LARGE)]  # above the axis
    columns = np.flatnonzero(dark.any(0))
    bars = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    heights = [int(dark[:, bar].sum(0).max()) for bar in bars]
    unit = 0.84 * LARGE / 10
    assert [round((height + 1) / unit) for height in heights] == list(table.values())


def test_a_chart_is_asked_for_a_value_it_has() -> None:
    for _, record in charts(random.Random(0), 20):
        question, answer = record(["x.png"])["messages"]
        assert re.fullmatch(r"What is the value of [A-H]\?", question["content"][1]["text"])
        assert 1 <= int(answer["content"]) <= 9


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_preparation_takes_every_sample(made: Path, kind: str, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer([SOURCE], 320, tokenizer)
    vision = VisionConfig(
        hidden_size=16, num_layers=1, num_heads=1, mlp_size=16, patch_size=7, position_grid=16,
        image_sizes={SMALL: 8, LARGE: 16}, min_image_size=28,
    )  # fmt: skip
    model = ModelConfig(vocab_size=320, vision=vision)
    encoder = Encoder(Recipe(str(tokenizer), model, FORMATS.get(kind, "chat"), "assistant"))
    origin = str(made / "raw" / kind / "samples.jsonl")
    for record in records(made, kind)[:50]:
        sample = encoder.encode(record, f"{origin}:1")
        assert len(sample.images) == (2 if kind == "interleaved" else 1)
        queries = {placement.layout.num_tokens for placement in sample.placements}
        assert queries == ({16} if kind in ("pages", "charts") else {8})
        assert sample.category == ("digits" if kind == "digits_validation" else kind)
