"""The page of `make needle`, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aria_train.config import load_config
from demo import needle

ROOT = Path(needle.__file__).parents[1]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a `make needle` starts, in a working directory of its own; every evaluation finds half of the needles."""
    commands: list[list[str]] = []

    def train(processes: int, *arguments: str) -> None:
        commands.append(list(arguments))
        for name in (*needle.STAGES, needle.SAME_BASE):
            folder = tmp_path / needle.ROOT / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text(
                json.dumps({"step": 1, "tokens": 1500000, "step_seconds": 180.0}) + "\n"
            )

    def evaluate(kind: str, run_dir: str, *options: str) -> dict[str, Any]:
        commands.append([kind, run_dir])
        Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
        found = [[0.5] * needle.DEPTHS for _ in needle.LENGTHS]
        files = ["grid.json", str(tmp_path / "grid.png")]
        return {
            "cells_found": 0.25, "accuracy": 0.5, "lengths": list(needle.LENGTHS), "teacher_forced": found,
            "files": files,
        }  # fmt: skip

    (tmp_path / "docs").mkdir()
    (tmp_path / needle.PAGE).write_text((ROOT / needle.PAGE).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needle.corpora, "prepare", lambda: None)
    monkeypatch.setattr(needle.corpora, "prepare_short_needles", lambda: None)
    monkeypatch.setattr(needle, "torchrun", train)
    monkeypatch.setattr(needle, "evaluate", evaluate)
    monkeypatch.setattr(needle, "CONFIGS", [str(ROOT / path) for path in needle.CONFIGS])
    return commands


def test_the_page_gets_figures_and_pictures_and_keeps_its_words(started: list[list[str]]) -> None:
    needle.main()
    needle.main()
    page = needle.PAGE.read_text()
    assert page.startswith((ROOT / needle.PAGE).read_text().partition("<!--")[0])
    assert page.count("| 25.0% | 50.0% | 50.0% | 50.0% | 50.0% |") == 3
    assert "stage3_same_base 1.5M tokens in 3 minutes" in page
    for name in needle.SHOWN:
        assert f"(needle/{name}.png)" in page
        assert (needle.PICTURES / f"{name}.png").exists()


def test_both_third_stages_start_from_the_second_and_differ_in_the_base_alone(started: list[list[str]]) -> None:
    needle.main()
    curriculum, same_base = started[0], started[1]
    assert curriculum[0] == "curriculum"
    assert same_base[0] == "train"
    assert "checkpoint.init_from=runs/needle/stage2_mm" in same_base
    raised, kept = load_config(curriculum[3]), load_config(same_base[1], same_base[2:])
    assert (raised.model.rope_base, kept.model.rope_base) == (5e6, 1e5)
    for one, other in ((raised.data, kept.data), (raised.schedule, kept.schedule), (raised.optimizer, kept.optimizer)):
        assert one == other
    assert raised.train.max_tokens == kept.train.max_tokens
    second = load_config(curriculum[2])
    assert raised.train.context_length == 4 * second.train.context_length == max(needle.LENGTHS)
