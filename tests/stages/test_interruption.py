"""Four stages killed at random moments, stopped, or run in parts end bit for bit like four stages left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aria_train.cli import main
from aria_train.errors import EXIT_RESTART
from tests.distributed import RankFailure, launch
from tests.stages.recipe import NAMES, read_timeline, saved_tensors, write_stages
from tests.tiny import read_steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


def run_rank(arguments: list[str], after: float | None = None, number: int = signal.SIGKILL) -> tuple[int, float]:
    """The command on one rank, which a signal hits after so many seconds; returns its status and what it took."""
    began = time.monotonic()
    if after is not None:
        threading.Timer(after, lambda: os.kill(os.getpid(), number)).start()
    return main(["curriculum", *arguments, "parallel.expert_parallel_size=2"]), time.monotonic() - began


def run(paths: list[str], root: Path, **how: Any) -> list[Any]:
    """The command on two ranks."""
    return launch(run_rank, 2, [*paths, f"train.run_dir={root}"], *how.values(), timeout=240)


def assert_complete(outcomes: list[Any]) -> float:
    """Both ranks ended well; returns the seconds they took."""
    assert all(not isinstance(outcome, RankFailure) and outcome[0] == 0 for outcome in outcomes), outcomes
    return float(outcomes[0][1])


def kill_and_go_on(paths: list[str], root: Path, seconds: float, kills: int, seed: int) -> int:
    """Runs to the end through so many kills of all ranks at random moments; returns how many struck."""
    moments = random.Random(seed)
    struck = 0
    for _ in range(kills):
        outcomes = run(paths, root, after=moments.uniform(0.1, 0.4) * seconds)
        struck += any(isinstance(outcome, RankFailure) and "SIGKILL" in str(outcome) for outcome in outcomes)
    assert_complete(run(paths, root))
    return struck


def assert_same(found: Path, wanted: Path, stages: Sequence[str] = NAMES) -> None:
    """Weights, moments and metrics of every stage, and the timeline, are equal to the bit."""
    for name in stages:
        ours, theirs = (saved_tensors(root / name) for root in (found, wanted))
        assert ours.keys() == theirs.keys()
        assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == [], name
        assert read_steps(found / name) == read_steps(wanted / name), name
    assert read_timeline(found) == read_timeline(wanted)


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, float]:
    """The stages' files, the root of an uninterrupted run of them, and the seconds it took."""
    folder = tmp_path_factory.mktemp("curriculum")
    paths = write_stages(folder / "stages")
    return paths, folder / "runs", assert_complete(run(paths, folder / "runs"))


def test_killed_at_random_moments(curriculum: tuple[list[str], Path, float], tmp_path: Path) -> None:
    paths, wanted, seconds = curriculum
    assert kill_and_go_on(paths, tmp_path / "runs", seconds, kills=3, seed=7) >= 2
    assert_same(tmp_path / "runs", wanted)


def test_run_in_parts_and_stopped_on_request(curriculum: tuple[list[str], Path, float], tmp_path: Path) -> None:
    paths, wanted, seconds = curriculum
    assert_complete(run(paths[:1], tmp_path / "runs"))
    outcomes = run(paths[:3], tmp_path / "runs", after=0.3 * seconds, number=signal.SIGTERM)
    assert [outcome[0] for outcome in outcomes] in ([EXIT_RESTART] * 2, [0] * 2), outcomes
    assert_complete(run(paths, tmp_path / "runs"))
    assert_same(tmp_path / "runs", wanted)


def test_the_timeline_covers_all_stages(curriculum: tuple[list[str], Path, float]) -> None:
    timeline = read_timeline(curriculum[1])
    assert [line["stage"] for line in timeline] == [n for n, steps in zip(NAMES, (5, 4, 4, 4)) for _ in range(steps)]
    tokens = [line["tokens"] for line in timeline]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 5 * 128 + 4 * 128 + 4 * 512 + 4 * 512
    assert [line["context_length"] for line in timeline] == [32] * 9 + [128] * 8
    bases = [line["rope_base"] for line in timeline]
    assert bases[:9] == [1000.0] * 9
    assert bases[9:13] == pytest.approx([1000.0, 1000.0 * 20.0**0.512, 20000.0, 20000.0])
    assert timeline[-1]["lr"] == 0
    assert timeline[9]["mixture"] == {"long": 0.4, "joined": 0.4, "short": 0.2}
    assert (curriculum[1] / "timeline.png").stat().st_size > 10_000


def test_what_is_complete_is_not_run_again(
    curriculum: tuple[list[str], Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, root, _ = curriculum
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.distcp")}
    assert main(["curriculum", *paths, f"train.run_dir={root}"]) == 0
    assert "4 stages complete" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*.distcp")}


def test_a_stage_that_the_next_has_built_upon_is_not_made_longer(
    curriculum: tuple[list[str], Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, root, _ = curriculum
    longer = tmp_path / f"{NAMES[1]}.yaml"
    longer.write_text(Path(paths[1]).read_text().replace("max_steps: 4", "max_steps: 9"))
    assert main(["curriculum", paths[0], str(longer), *paths[2:], f"train.run_dir={root}"]) == 2
    assert f"from weights of {NAMES[1]} before its last step (4 of 9 are done)" in capsys.readouterr().err
