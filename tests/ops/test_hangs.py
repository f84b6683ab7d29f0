"""When no step ends, all ranks say where they are, and one names those that cannot."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aria_train.config import RunConfig
from aria_train.errors import EXIT_RESTART
from aria_train.train import watchdog
from aria_train.train.watchdog import Watchdog, last_collective
from tests.distributed import launch
from tests.tiny import tiny_config, unequal_corpora, with_values


class Ended(Exception):
    """In place of the process."""


@pytest.fixture(autouse=True)
def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog, "_GRACE", 0.0)


def hang(folder: Path, rank: int, ranks: int) -> None:
    dog = Watchdog(60, rank, ranks, folder)
    dog.beat(7, "training")
    with pytest.raises(Ended, match=str(EXIT_RESTART)):
        dog._end_job()


def test_the_first_that_can_speak_names_those_that_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_00003.txt").write_text("rank 3 was here")
    hang(tmp_path, 1, 5)
    told = capsys.readouterr().err
    assert "training after step 7" in told
    assert "rank 3 was here" in told
    assert "Without a report, so dead or frozen: rank 0, 2, 4." in told
    hang(tmp_path, 2, 5)
    assert not capsys.readouterr().err


def test_a_rank_that_is_cut_off_meanwhile_still_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may leave some moments before it, which is an error in its training loop."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(watchdog, "_GRACE", 0.5)
    dog = Watchdog(0.05, 0, 1, tmp_path)
    dog.start(7)
    assert dog._ending.wait(60)
    dog.stop()
    assert statuses == [EXIT_RESTART]
    assert (tmp_path / "rank_00000.txt").exists()


def newest_first_in(monkeypatch: pytest.MonkeyPatch, **recorders: list[dict[str, Any]]) -> str:
    """What is said where PyTorch has these flight recorders, by the names that they have there."""
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        monkeypatch.delattr(torch._C._distributed_c10d, name, raising=False)
    for name, entries in recorders.items():

        def dump(_collectives: bool, _only_active: bool, entries: list[dict[str, Any]] = entries) -> bytes:
            return json.dumps({"entries": entries}).encode()

        monkeypatch.setattr(torch._C._distributed_c10d, name, dump, raising=False)
    return last_collective()


def entry(name: str, created: int, number: int) -> dict[str, Any]:
    return {
        "record_id": number, "profiling_name": name, "time_created_ns": created, "collective_seq_id": number,
        "retired": False, "process_group": ["1", "mesh_dense"], "input_sizes": [[4]], "output_sizes": [[8]],
    }  # fmt: skip


def test_the_last_collective_is_the_newest_of_all_recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = [entry("gloo:all_reduce", 10, 8), entry("gloo:barrier", 20, 9)]
    nccl = [entry("nccl:all_to_all", 15, 2), entry("nccl:_all_gather_base", 30, 3)]
    on_gpus = newest_first_in(monkeypatch, _dump_fr_trace_json=gloo, _dump_nccl_trace_json=nccl)
    assert on_gpus == "nccl:_all_gather_base #3 of group mesh_dense, [[4]] -> [[8]], not complete"
    on_cpus = newest_first_in(monkeypatch, _dump_fr_trace_json=gloo)
    assert on_cpus.startswith("gloo:barrier #9 ")
    later = newest_first_in(monkeypatch, _dump_fr_trace_json=gloo, _dump_nccl_trace_json=nccl[:1])
    assert later.startswith("gloo:barrier #9 ")
    assert newest_first_in(monkeypatch, _dump_fr_trace_json=[], _dump_nccl_trace_json=[]) == "none yet"
    assert newest_first_in(monkeypatch).startswith("unknown")


def run_with_a_sleeper(config: RunConfig) -> None:
    """Rank 1 falls asleep in the first step."""
    import torch.distributed as dist

    from aria_train.train import trainer
    from aria_train.train.session import run_stage

    watchdog._GRACE = 1.0
    step = trainer.Trainer._step

    def step_or_sleep(self: Any, batches: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(3600)
        return step(self, batches)

    trainer.Trainer._step = step_or_sleep  # type: ignore[method-assign]
    run_stage(config)


@pytest.mark.distributed
def test_a_rank_that_sleeps_ends_the_job_again_and_again(tmp_path: Path) -> None:
    """Started again it hangs at the same step, and the reports of before are not taken for those of now."""
    config = tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"))
    config = with_values(config, guard={"hang_minutes": 0.05})
    for _ in range(2):
        outcomes = launch(run_with_a_sleeper, 2, config, timeout=120)
        assert [str(outcome) for outcome in outcomes] == [f"died without a word (exit status {EXIT_RESTART})"] * 2
    reports = sorted(Path(config.train.run_dir, "logs", "hangs").glob("*/*.txt"))
    assert [report.name for report in reports] == ["rank_00000.txt", "rank_00001.txt"] * 2
    assert "step_or_sleep" in reports[1].read_text()
    assert "last collective: gloo:" in reports[0].read_text()
