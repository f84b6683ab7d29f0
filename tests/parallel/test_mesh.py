"""Which device a rank takes, how long it waits for others, and how many of them it can be connected with."""

from __future__ import annotations

import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aria_train.cli import main
from aria_train.config import ParallelConfig, dump_config
from aria_train.errors import ConfigError
from aria_train.parallel import mesh
from aria_train.parallel.sockets import Sockets
from tests.distributed import run_distributed
from tests.tiny import tiny_config, unequal_corpora


def waits(hang_minutes: float) -> set[timedelta]:
    """How long this rank waits in groups of every kind, and at sockets."""
    mesh.set_patience(hang_minutes)
    meshes = mesh.build_meshes(ParallelConfig(expert_parallel_size=2), torch.device("cpu"))
    groups = [dist.group.WORLD, *meshes.axes.get_all_groups(), meshes.dense_data.get_group(), dist.new_group()]
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups if group is not None}
    group = dist.group.WORLD
    assert group is not None
    sockets = Sockets.between(group)
    assert sockets is not None
    return found | {timedelta(seconds=s.gettimeout() or 0) for s in sockets._sockets.values()}


def waits_of_stages() -> list[set[timedelta]]:
    """The process group outlives a stage, and the next stage may have another patience."""
    return [waits(minutes) for minutes in (60, 0.1, 30, 0, 1e9)]


@pytest.mark.distributed
def test_ranks_wait_longer_for_each_other_than_the_watchdog_does() -> None:
    long = timedelta(days=20)
    expected = [{wait} for wait in (timedelta(minutes=65), timedelta(minutes=30), timedelta(minutes=35), long, long)]
    assert run_distributed(waits_of_stages, 2) == [expected, expected]


def starts_afresh() -> timedelta:
    dist.destroy_process_group()
    del os.environ["RANK"]
    mesh.set_patience(45)
    mesh.init_process_group(torch.device("cpu"))
    group: Any = dist.group.WORLD
    wait: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return wait


@pytest.mark.distributed
def test_a_new_process_group_waits_as_long() -> None:
    assert run_distributed(starts_afresh, 1) == [timedelta(minutes=50)]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
def test_each_rank_of_a_machine_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mesh.pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert mesh.pick_device("auto") == torch.device("cuda", 3)
    assert mesh.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"8 ranks on this machine see 4 GPU\(s\)"):
        mesh.pick_device("auto")


def test_asking_for_a_gpu_where_there_is_none_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(tmp_path / "run", unequal_corpora(tmp_path), parallel={"expert_parallel_size": 1})
    (tmp_path / "stage.yaml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "stage.yaml"), "train.device=cuda"]) == 2
    error = capsys.readouterr().err
    assert "train.device is cuda" in error
    assert "Traceback" not in error


def files_allowed(*limits: tuple[int, int]) -> list[tuple[int, int]]:
    """Soft and hard limit after each of these: in a process of its own, as a hard limit never rises again."""
    found = []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        mesh.allow_many_sockets()
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE))
    return found


@pytest.mark.distributed
def test_as_many_files_may_be_open_as_the_system_admits() -> None:
    [found] = run_distributed(files_allowed, 1, (256, 500), (128, 256), (256, 256))
    assert found == [(500, 500), (256, 256), (256, 256)]
