"""`train.profile`: a trace, and a table that names the parts of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aria_train.cli import main
from aria_train.config import RunConfig, dump_config
from aria_train.train.profile import WARM_UP
from aria_train.train.session import run_stage
from tests.distributed import run_distributed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

PARTS = {
    "attention", "router", "dispatch", "experts", "shared expert", "norms", "embedding", "head", "optimizer",
    "collectives", "data",
}  # fmt: skip


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of five steps, of which two are watched."""
    folder = tmp_path_factory.mktemp("profile")
    config = tiny_config(folder / "run", unequal_corpora(folder / "corpora"), parallel={"expert_parallel_size": 1})
    config = with_values(config, train={"global_batch_size": 4, "profile": 2})
    run_stage(config)
    return config


def rows(table: str) -> dict[str, list[float]]:
    """Part -> milliseconds forward, backward, together, and share."""
    lines = table.split("\n\n")[0].splitlines()[1:-1]
    return {line[:24].strip(): [float(cell.rstrip("%")) for cell in line[24:].split()] for line in lines}


def test_the_table_names_every_part_forward_and_backward(watched: RunConfig) -> None:
    table = rows(Path(watched.train.run_dir, "profile", "rank0.txt").read_text())
    assert table.keys() >= PARTS
    for part in PARTS - {"optimizer", "collectives", "data", "head", "embedding"}:
        forward, backward, together, _ = table[part]
        assert forward > 0, part
        assert backward > 0, part
        assert together == pytest.approx(forward + backward, abs=0.02)
    assert table["optimizer"][0] > 0
    assert sum(row[3] for row in table.values()) == pytest.approx(100, abs=1)


def test_the_trace_holds_the_watched_steps_alone(watched: RunConfig) -> None:
    events = json.loads(Path(watched.train.run_dir, "profile", "rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("step") == 2
    assert names.count("part: experts") == names.count("part: router") > 0


@pytest.mark.distributed
def test_all_ranks_write_a_table_and_the_first_a_trace(watched: RunConfig, tmp_path: Path) -> None:
    run_distributed(run_stage, 2, with_values(watched, train={"run_dir": str(tmp_path)}))
    assert sorted(file.name for file in (tmp_path / "profile").iterdir()) == ["rank0.json", "rank0.txt", "rank1.txt"]


def test_watching_changes_nothing(watched: RunConfig, tmp_path: Path) -> None:
    run_stage(with_values(watched, train={"run_dir": str(tmp_path), "profile": 0}))
    assert read_steps(tmp_path) == read_steps(watched.train.run_dir)
    assert not (tmp_path / "profile").exists()


def test_a_run_too_short_to_be_watched_says_so(
    watched: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(with_values(watched, train={"run_dir": str(tmp_path), "max_steps": WARM_UP}))
    assert "train.profile: no step was watched" in " ".join(capsys.readouterr().out.split())


def test_a_bad_value_is_one_clear_error(watched: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(dump_config(watched))
    assert main(["train", str(file), "train.profile=trace.json"]) == 2
    error = capsys.readouterr().err
    assert "train.profile" in error
    assert "trace.json" in error
    assert "Traceback" not in error
