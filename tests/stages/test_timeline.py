"""The timeline of a curriculum: whole whatever the stages' records lack, and never in the way of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aria_train.cli import main
from aria_train.stages import curriculum
from aria_train.stages.stage import load_stages
from aria_train.stages.timeline import read_tracks, write_timeline
from tests.stages.recipe import NAMES, read_timeline, write_stages
from tests.tiny import read_steps


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """The files of the first two stages."""
    return write_stages(tmp_path / "stages")[:2]


def test_stages_that_evaluate_without_held_out_data_train_to_the_end(paths: list[str], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    overrides = [f"train.run_dir={root}", "train.eval_interval_steps=1", "train.max_steps=2"]
    assert main(["curriculum", *paths, *overrides]) == 0
    assert [len(read_steps(root / name)) for name in NAMES[:2]] == [2, 2]
    assert [line["stage"] for line in read_timeline(root)] == [NAMES[0]] * 2 + [NAMES[1]] * 2
    assert (root / "timeline.png").is_file()


def test_losses_that_are_missing_or_not_finite_are_left_out(paths: list[str], tmp_path: Path) -> None:
    stages = load_stages(paths, [f"train.run_dir={tmp_path / 'runs'}"])
    folder = stages[0].run_dir
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", [{"step": 1, "tokens": 128, "loss": None, "lr": 1e-3}])
    evaluations = [{"step": 0, "tokens": 0}, {"step": 1, "tokens": 128, "loss": None}]
    write_lines(folder / "evaluations.jsonl", evaluations)
    write_timeline(stages)
    assert (tmp_path / "runs" / "timeline.png").is_file()
    assert read_tracks(stages)[0].evaluations == []
    write_lines(folder / "evaluations.jsonl", [*evaluations, {"step": 2, "tokens": 256, "loss": 3.5}])
    write_timeline(stages)
    assert read_tracks(stages)[0].evaluations == [(256, 3.5)]


def test_a_timeline_that_cannot_be_written_stops_nothing(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []
    monkeypatch.setattr(curriculum, "train_stage", lambda config: trained.append(config.stage))
    (tmp_path / "runs" / "timeline.jsonl").mkdir(parents=True)
    curriculum.train_stages(load_stages(paths, [f"train.run_dir={tmp_path / 'runs'}"]), is_main=True)
    assert trained == list(NAMES[:2])
    assert "the timeline in" in capsys.readouterr().err


def write_lines(path: Path, lines: list[dict[str, float | None]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
