"""Checkpoints in a store that has no renames, and does not always answer."""

from __future__ import annotations

import secrets
import zlib
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from aria_train.cli import main
from aria_train.errors import CheckpointError
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Folder
from aria_train.parallel.checkpoint import shelf as checkpoint_shelf
from aria_train.parallel.checkpoint.manifest import encode
from tests.ops.test_checkpoints import manifest


@pytest.fixture
def remote() -> checkpoint.Folder:
    """Checkpoints of steps 1, 2 and 3 in a store without renames, and a fourth that is being written."""
    home = checkpoint.locate(f"memory://{secrets.token_hex(4)}")
    for step in (1, 2, 3, 4):
        folder = checkpoint.folder_of_step(home, step)
        told = manifest(step)
        told.files = {"data": {"bytes": 1, "crc32": zlib.crc32(b"x")}}
        for name, content in (("data", b"x"), ("manifest.json", encode(told)))[: 1 if step == 4 else 2]:
            with (folder / name).open("wb") as file:
                file.write(content)
    return home


def steps_of(home: Folder) -> list[int]:
    return [entry.step for entry in checkpoint.entries(home) if entry.manifest]


def test_what_a_store_does_not_answer_about_is_not_removed(
    remote: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError("503 slow down")

    assert steps_of(remote) == [1, 2, 3]
    for broken in ("info", "open", "ls"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, broken, fail)
            if broken == "ls":
                for act in (lambda: checkpoint.prune(remote, 10), lambda: checkpoint.newest_intact(remote)):
                    with pytest.raises(CheckpointError, match="cannot be listed.*503"):
                        act()
                assert main(["checkpoint", "list", str(remote)]) == 2
                assert "503" in capsys.readouterr().err
            else:
                checkpoint.prune(remote, 10)
        assert steps_of(remote) == [1, 2, 3]
    assert [str(folder) for folder in checkpoint.prune(remote, 2)] == [f"{remote}/checkpoints/step_00000001"]
    assert len(checkpoint.entries(remote)) == 2, "what was being written is gone"


def test_a_store_lists_a_checkpoint_once(remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads the newest one's manifest alone, however many there are."""
    listed, read = [], []
    ls, read_manifest = MemoryFileSystem.ls, checkpoint_shelf.read_manifest
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda fs, path, **o: listed.append(path) or ls(fs, path, **o))
    monkeypatch.setattr(checkpoint_shelf, "read_manifest", lambda folder: read.append(folder) or read_manifest(folder))
    newest, passed = checkpoint.latest(remote)
    assert newest is not None
    assert newest.step == 3
    assert [entry.problem for entry in passed] == ["its writing was interrupted"]
    assert len(listed) == 3
    assert len(read) == 1
