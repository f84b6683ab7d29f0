"""Checkpoints under attack: flipped bytes, full disks, hostile files; and written beside the training."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aria_train.cli import main
from aria_train.errors import CheckpointError
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Folder, Manifest, SaveFailed, Saver
from aria_train.parallel.checkpoint import reading as checkpoint_reading
from aria_train.parallel.checkpoint.manifest import decode, encode
from tests.distributed import run_distributed

ROWS = 24


def manifest(step: int = 1, **values: Any) -> Manifest:
    return Manifest(step=step, tokens=step * 10, config={}, layout={"world_size": 1}, sources={}, files={}, **values)


def some_tensors(offset: float = 0.0) -> dict[str, Tensor]:
    """A sharded and a plain tensor, by this rank's part in them."""
    whole = torch.arange(ROWS * 4, dtype=torch.float32).view(ROWS, 4) + offset
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"model.weight": distribute_tensor(whole, mesh, [Shard(0)]), "model.count": torch.tensor([offset])}


def save_some(home: str, steps: list[int]) -> None:
    for step in steps:
        checkpoint.save(checkpoint.folder_of_step(Path(home), step), some_tensors(step), manifest(step))


def load_some(folder: str | Folder) -> list[float]:
    """Loads into zeros; returns this rank's part, flat."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in some_tensors().items()}
    checkpoint.load(checkpoint.locate(folder), tensors)
    return [float(x) for x in tensors["model.weight"].to_local().flatten()]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1, 2 and 3, written by two ranks."""
    home = tmp_path_factory.mktemp("saved")
    run_distributed(save_some, 2, str(home), [1, 2, 3])
    return home


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(home: Path, step: int) -> list[Path]:
    return sorted(checkpoint.folder_of_step(home, step).iterdir())


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1 << bit
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 99), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_in_any_file_is_refused_by_name(home: Path, which: int, at: int, bit: int) -> None:
    files = files_of(home, 3)
    assert {file.name for file in files} == {".metadata", "manifest.json", "__0_0.distcp", "__1_0.distcp"}
    file = files[which % len(files)]
    flip(file, at, bit)
    try:
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.verify(file.parent)
        newest, passed = checkpoint.newest_intact(home)
        assert newest is not None
        assert newest.folder == checkpoint.folder_of_step(home, 2)
        assert len(passed) == 1
        assert file.name in passed[0].problem
    finally:
        flip(file, at, bit)
    checkpoint.verify(file.parent)


@pytest.mark.parametrize("name", [".metadata", "manifest.json", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "empty"])
def test_a_file_of_another_length_is_refused_by_name(home: Path, name: str, damage: str) -> None:
    file = checkpoint.folder_of_step(home, 3) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-1], "longer": content + b"\n", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(file.parent)
    newest, _ = checkpoint.latest(home)
    assert newest is not None
    assert newest.step == 2


def try_to_load(folder: str) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_some(folder)
    return str(raised.value)


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_of_them_found_damaged(home: Path) -> None:
    flip(checkpoint.folder_of_step(home, 3) / "__1_0.distcp", 500)
    for said in run_distributed(try_to_load, 3, str(checkpoint.folder_of_step(home, 3))):
        assert "__1_0.distcp does not match the checksum" in said


def files_read(folder: str) -> list[str]:
    read = []
    fingerprint = checkpoint_reading.fingerprint

    def note(path: Path) -> dict[str, int]:
        read.append(path.name)
        return fingerprint(path)

    checkpoint_reading.fingerprint = note  # type: ignore[assignment]
    load_some(folder)
    return read


@pytest.mark.distributed
def test_each_file_is_verified_once_by_one_rank(home: Path) -> None:
    first, second = run_distributed(files_read, 2, str(checkpoint.folder_of_step(home, 3)))
    assert sorted(first + second) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert first
    assert second


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def forge_manifest(fields: dict[str, Any]) -> bytes:
    """Bytes of a manifest of any fields, with the right checksum."""
    body = json.dumps(fields, indent=1)
    return json.dumps(fields | {"crc32": zlib.crc32(body.encode())}, indent=1).encode()


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file, and makes the manifest agree."""
    (folder / name).write_bytes(content)
    told = decode((folder / "manifest.json").read_bytes())
    told.files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "manifest.json").write_bytes(encode(told))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.distributed
def test_no_file_of_a_checkpoint_runs_code(home: Path, tmp_path: Path, name: str) -> None:
    folder, marker = checkpoint.folder_of_step(home, 3), tmp_path / "executed"
    forge(folder, name, pickle.dumps(Attack(marker)))
    with pytest.raises(Exception):  # noqa: B017, PT011 - a data file that is no tensor is torch's to refuse
        run_distributed(load_some, 1, str(folder))
    assert not marker.exists()


def test_the_index_may_not_point_elsewhere(home: Path) -> None:
    folder = checkpoint.folder_of_step(home, 3)
    index = checkpoint.reader(folder).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = "../step_00000002/__0_0.distcp"
    forge(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(CheckpointError, match="refers to a file elsewhere"):
        checkpoint.stored_shapes(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["step", "tokens", "config", "layout", "sources", "files", "guard", "format"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300) | ANYTHING.map(pickle.dumps))
def test_any_index_is_refused_that_is_none(home: Path, content: bytes) -> None:
    folder = checkpoint.folder_of_step(home, 3)
    forge(folder, ".metadata", content)
    with pytest.raises(CheckpointError, match=".metadata"):
        checkpoint.stored_shapes(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300) | st.dictionaries(st.sampled_from(FIELDS), ANYTHING).map(forge_manifest))
def test_any_manifest_is_refused_that_is_none(home: Path, content: bytes) -> None:
    """Also one whose checksum is right."""
    folder = checkpoint.folder_of_step(home, 3)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="manifest.json"):
        checkpoint.read_manifest(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_beside(home: str, asynchronous: bool) -> list[str]:
    """Saves, moves the tensors at once, saves again."""
    said: list[str] = []
    saver = Saver(asynchronous, said.append)
    tensors = some_tensors()
    for step in (1, 2):
        saver.save(checkpoint.folder_of_step(Path(home), step), tensors, manifest(step), after=lambda: None)
        for tensor in tensors.values():
            tensor += 100
    saver.finish()
    saver.close()
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_holds_what_there_was_when_it_began(tmp_path: Path, asynchronous: bool) -> None:
    run_distributed(save_beside, 2, str(tmp_path), asynchronous)
    for step, offset in ((1, 0.0), (2, 100.0)):
        (values,) = run_distributed(load_some, 1, str(checkpoint.folder_of_step(tmp_path, step)))
        assert values == [offset + i for i in range(ROWS * 4)]


def save_with_limited_files(home: str, asynchronous: bool, limited_rank: int) -> str:
    """One rank cannot write more than a few bytes to any file; then it can again."""
    said: list[str] = []
    saver = Saver(asynchronous, said.append)
    folder = checkpoint.folder_of_step(Path(home), 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    saver.save(folder, some_tensors(), manifest(4), after=lambda: None)
    with pytest.raises(SaveFailed) as raised:
        saver.finish()
    assert said == [str(raised.value)]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert not [path for path in Path(home, "checkpoints").iterdir() if "step_00000004" in path.name]
    saver.save(folder, some_tensors(4.0), manifest(4), after=lambda: None)
    saver.finish()
    return said[0]


@pytest.mark.distributed
@pytest.mark.parametrize(("asynchronous", "limited_rank"), [(True, 0), (True, 1), (False, 1)])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    home: Path, asynchronous: bool, limited_rank: int
) -> None:
    said = run_distributed(save_with_limited_files, 2, str(home), asynchronous, limited_rank)
    assert said[0] == said[1]
    assert "step_00000004 could not be written" in said[0]
    assert f"rank {limited_rank}" in said[0]
    assert [entry.folder.name for entry in checkpoint.entries(home) if entry.manifest] == [
        f"step_{step:08d}" for step in (1, 2, 3, 4)
    ]
    checkpoint.verify(checkpoint.folder_of_step(home, 4))


def save_on_a_full_disk(home: str) -> str:
    def is_full(_path: Path) -> Any:
        return SimpleNamespace(free=24_000)

    shutil.disk_usage = is_full  # type: ignore[assignment]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    with pytest.raises(SaveFailed) as raised:
        save_some(home, [4])
    return str(raised.value)


@pytest.mark.distributed
def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    """What writes tensors fails with words that do not tell."""
    (said,) = run_distributed(save_on_a_full_disk, 1, str(tmp_path))
    assert "step_00000004 could not be written: no space left on device: rank 0" in said


def save_at_url(url: str, steps: list[int]) -> list[float]:
    home = checkpoint.locate(url)
    for step in steps:
        checkpoint.save(checkpoint.folder_of_step(home, step), some_tensors(step), manifest(step))
    newest, passed = checkpoint.newest_intact(home)
    assert newest is not None
    assert not passed
    return load_some(newest.folder)


@pytest.mark.distributed
def test_checkpoints_behind_a_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/run"
    first, second = run_distributed(save_at_url, 2, url, [1, 2, 3])
    assert first + second == [3.0 + i for i in range(ROWS * 4)]
    home = checkpoint.locate(url)
    local = checkpoint.folder_of_step(tmp_path / "bucket" / "run", 3)
    # The manifest is written last: without it there is no checkpoint.
    (local / "manifest.json").unlink()
    newest, passed = checkpoint.latest(home)
    assert newest is not None
    assert str(newest.folder) == f"{url}/checkpoints/step_00000002"
    assert "its writing was interrupted" in passed[0].problem
    flip(local.with_name("step_00000002") / "__0_0.distcp", 300)
    intact, _ = checkpoint.newest_intact(home)
    assert intact is not None
    assert str(intact.folder) == f"{url}/checkpoints/step_00000001"
    assert [str(folder) for folder in checkpoint.prune(home, keep_last=1)] == [
        f"{url}/checkpoints/step_00000001",
        f"{url}/checkpoints/step_00000003",
    ]
    assert sorted(os.listdir(local.parent)) == ["step_00000002"]


# ---------------------------------------------------------------------------------------------------------------------
# Keeping


def test_prune_keeps_the_newest_multiples_the_last_good_one_and_damaged_ones(tmp_path: Path) -> None:
    def write(step: int, streak: int = 0) -> Path:
        folder = checkpoint.folder_of_step(tmp_path, step)
        checkpoint.save_alone(
            folder,
            lambda inside: (inside / "data").write_bytes(b"x") and None,
            manifest(step, guard={"streak": streak}),
        )
        return folder

    for step in (5, 10, 15, 20, 25):
        write(step)
    for step in (30, 35):
        write(step, streak=2)
    (write(12) / "data").unlink()
    for name in ("step_00000040.writing", "step_00000041.removing"):
        (tmp_path / "checkpoints" / name).mkdir()
    damaged = write(45)
    (damaged / "manifest.json").unlink()
    gone = checkpoint.prune(tmp_path, keep_last=2, keep_every_steps=10, unfinished=False)
    assert [folder.name for folder in gone] == ["step_00000005", "step_00000015"]
    gone = checkpoint.prune(tmp_path, keep_last=2)
    assert [folder.name for folder in gone] == [
        "step_00000010",
        "step_00000020",
        "step_00000040.writing",
        "step_00000041.removing",
    ]
    assert [entry.folder.name for entry in checkpoint.entries(tmp_path)] == [
        "step_00000012",  # damaged
        "step_00000025",  # the last good one
        "step_00000030",
        "step_00000035",
        "step_00000045",  # damaged
    ]


def test_commands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(home)]) == 0
    assert capsys.readouterr().out.count("intact") == 3
    flip(checkpoint.folder_of_step(home, 2) / "__0_0.distcp", 700)
    assert main(["checkpoint", "verify", str(home)]) == 2
    told = capsys.readouterr()
    assert "step_00000002 is damaged: __0_0.distcp" in told.out
    assert "1 damaged" in told.err
    assert main(["checkpoint", "list", str(home)]) == 0
    assert "step_00000003" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(home), "--keep-last", "1"]) == 0
    assert "removed" in capsys.readouterr().out
    assert len(os.listdir(home / "checkpoints")) == 1
    assert main(["checkpoint", "list", str(home / "nowhere")]) == 2
    assert main(["checkpoint", "prune", str(home / "nowhere"), "--keep-last", "1"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def save_much(home: str, megabytes: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors: dict[str, Tensor] = {
        f"model.{i}": distribute_tensor(torch.ones(megabytes * 2**18 // 16, dtype=torch.float32), mesh, [Shard(0)])
        for i in range(16)
    }
    checkpoint.save(checkpoint.folder_of_step(Path(home), 1), tensors, manifest())


def memory_to_load(home: str, megabytes: int) -> float:
    """Most megabytes that loading takes beyond the tensors that are filled."""
    tensors = {f"model.{i}": torch.zeros(megabytes * 2**18 // 16) + 1 for i in range(16)}
    folder = checkpoint.folder_of_step(Path(home), 1)
    checkpoint.stored_shapes(folder)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    checkpoint.load(folder, dict(tensors))
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


@pytest.mark.distributed
def test_loading_at_another_layout_holds_one_saved_shard_at_a_time(tmp_path: Path) -> None:
    run_distributed(save_much, 2, str(tmp_path), 160)
    (extra,) = run_distributed(memory_to_load, 1, str(tmp_path), 160)
    assert extra < 48, f"{extra:.0f} MB beyond the 160 MB that are filled; one shard has 5"
