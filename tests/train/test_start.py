"""What a run refuses to begin with, what it waits for, and what a request to stop leaves for the next start."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aria_train.cli import main
from aria_train.config import RunConfig, dump_config
from aria_train.errors import EXIT_RESTART, CheckpointError, ConfigError
from aria_train.parallel import checkpoint
from aria_train.train import claim, signals
from aria_train.train.claim import RunLock
from tests.distributed import run_distributed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values


def run(config: RunConfig) -> None:
    from aria_train.train.session import run_stage

    run_stage(config)


def contents(run_dir: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted(Path(run_dir).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return unequal_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def config(sources: Any, tmp_path: Path) -> RunConfig:
    """4 steps on this process alone, saved after the second and the last."""
    base = tiny_config(tmp_path / "run", sources, parallel={"expert_parallel_size": 1})
    return with_values(
        base,
        model={"num_layers": 1},
        train={"global_batch_size": 4, "max_steps": 4},
        checkpoint={"interval_steps": 2},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Beginning anew where there was something


def test_another_storage_does_not_wipe_the_record(config: RunConfig, tmp_path: Path) -> None:
    config = with_values(config, checkpoint={"storage": str(tmp_path / "store")})
    run(config)
    before = contents(config.train.run_dir)
    longer = with_values(config, train={"max_steps": 5})
    mistyped = str(tmp_path / "stroe")
    with pytest.raises(CheckpointError, match=rf"lie in {tmp_path}/store; checkpoint.storage is now {mistyped}"):
        run(with_values(longer, checkpoint={"storage": mistyped}))
    assert not Path(mistyped).exists()
    assert contents(config.train.run_dir) == before
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "store" / "checkpoints", tmp_path / "elsewhere")
    run(with_values(longer, checkpoint={"storage": str(tmp_path / "elsewhere")}))
    assert [line["step"] for line in read_steps(config.train.run_dir)] == [1, 2, 3, 4, 5]


def test_damaged_checkpoints_alone_are_not_overwritten(config: RunConfig) -> None:
    run(config)
    shelf = Path(config.train.run_dir) / "checkpoints"
    (shelf / "step_00000002" / "manifest.json").unlink()
    next((shelf / "step_00000004").glob("*.distcp")).write_bytes(b"")
    (shelf / "step_00000005.writing").mkdir()
    before = contents(config.train.run_dir)
    with pytest.raises(CheckpointError, match="none that is intact") as raised:
        run(config)
    assert "step_00000002: " in str(raised.value)
    assert "step_00000004: " in str(raised.value)
    assert "step_00000005" not in str(raised.value)
    assert contents(config.train.run_dir) == before
    shelf.rename(shelf.with_name("away"))
    run(config)
    assert len(checkpoint.entries(Path(config.train.run_dir))) == 2


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_a_storage_that_cannot_be_written_is_refused_at_the_start(config: RunConfig, tmp_path: Path, url: str) -> None:
    (tmp_path / "file").write_text("mine")
    storage = url.format(tmp_path / "file")
    with pytest.raises(ConfigError, match=f"checkpoint.storage {storage} cannot be written to"):
        run(with_values(config, checkpoint={"storage": storage}))
    assert (tmp_path / "file").read_text() == "mine"
    assert not (Path(config.train.run_dir) / "metrics.jsonl").exists()


def test_a_full_disk_is_refused_at_the_start(config: RunConfig) -> None:
    run_dir = Path(config.train.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml.new").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"train.run_dir .* cannot be written to: No space left on device"):
        run(config)


def resume_and_count(config: RunConfig) -> tuple[int, int]:
    """How many manifests and indexes this rank reads."""
    from aria_train.parallel.checkpoint import manifest, reading

    manifests: list[str] = []
    indexes: list[str] = []
    manifest.decode = noting(manifests, "read", manifest.decode)
    reading._IndexUnpickler = noting(indexes, "read", reading._IndexUnpickler)  # type: ignore[misc, assignment]
    from aria_train.train.trainer import Trainer

    Trainer(config).close()
    return len(manifests), len(indexes)


@pytest.mark.distributed
def test_the_first_rank_alone_looks_for_checkpoints(config: RunConfig) -> None:
    """And each reads the index of the one it loads once."""
    run(config)
    assert run_distributed(resume_and_count, 2, config) == [(2, 1), (0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# One run in a directory


def acquire(run_dir: Path) -> tuple[RunLock, list[str]]:
    said: list[str] = []
    lock = RunLock(run_dir)
    lock.acquire(said.append)
    return lock, said


def test_the_holder_of_a_run_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_PATIENCE", 0.1)
    lock, said = acquire(tmp_path)
    assert said == []
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ConfigError, match=f"{tmp_path} is in use: {holder} trains in it"):
        RunLock(tmp_path).acquire(said.append)
    assert len(said) == 1
    assert holder in said[0]
    lock.release()
    again, _ = acquire(tmp_path)
    again.release()


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from aria_train.train.claim import RunLock\n"
        f"lock = RunLock(Path({str(tmp_path)!r})); lock.acquire(print); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
    lock, said = acquire(tmp_path)
    assert said == []
    lock.release()


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_file: Any, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for lock, said in (acquire(tmp_path), acquire(tmp_path)):
        assert said == []
        lock.release()


def command_without_patience(arguments: list[str]) -> tuple[int, str]:
    from tests.test_cli import command

    claim._PATIENCE = 0.1
    return command(arguments)


@pytest.mark.distributed
def test_all_ranks_leave_a_directory_that_is_in_use(config: RunConfig, tmp_path: Path) -> None:
    stage = tmp_path / "stage.yaml"
    stage.write_text(dump_config(config))
    Path(config.train.run_dir).mkdir()
    lock, _ = acquire(Path(config.train.run_dir))
    outcomes = run_distributed(command_without_patience, 2, ["train", str(stage)])
    lock.release()
    assert [status for status, _ in outcomes] == [2, 2]
    err = "".join(err for _, err in outcomes)
    assert err.count("aria-train: error") == 1
    assert "is in use" in err
    assert "Traceback" not in err
    # A start that failed keeps nobody out.
    lock, said = acquire(Path(config.train.run_dir))
    lock.release()
    assert said == []


@pytest.mark.parametrize("command", ["train", "curriculum"])
def test_tasks_of_srun_that_do_not_know_of_each_other_are_refused(
    command: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stage = tmp_path / "stage.yaml"
    stage.write_text(dump_config(config))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("RANK", raising=False)
    assert main([command, str(stage)]) == 2
    err = capsys.readouterr().err
    assert "srun started 8 processes" in err
    assert "aria-train launch" in err
    assert not Path(config.train.run_dir).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stopping on request


@pytest.mark.parametrize("step", [2, 4])
def test_a_request_to_stop_is_not_kept_waiting_by_an_evaluation(
    step: int, config: RunConfig, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves; the evaluation is made up, and the record is that of a run left alone."""
    from aria_train.train.trainer import Trainer

    config = with_values(config, data={"validation": sources[:1]}, train={"eval_interval_steps": 2, "eval_windows": 3})
    alone = with_values(config, train={"run_dir": str(tmp_path / "alone")})
    run(alone)
    done: list[str] = []
    monkeypatch.setattr(Trainer, "_step", asking_to_stop(step, Trainer._step))
    monkeypatch.setattr(Trainer, "_evaluate", noting(done, "evaluated", Trainer._evaluate))
    monkeypatch.setattr(Trainer, "_save", noting(done, "saved", Trainer._save))
    stage = tmp_path / "stage.yaml"
    stage.write_text(dump_config(config))
    assert main(["train", str(stage)]) == (EXIT_RESTART if step == 2 else 0)
    # At the last step there is nothing else left to do.
    assert done[-2:] == (["evaluated", "saved"] if step == 2 else ["saved", "evaluated"])
    monkeypatch.undo()
    assert main(["train", str(stage)]) == 0
    records = [Path(c.train.run_dir, "evaluations.jsonl").read_text() for c in (config, alone)]
    assert records[0] == records[1]
    assert [json.loads(line)["step"] for line in records[0].splitlines()] == [0, 2, 4]
    assert read_steps(config.train.run_dir) == read_steps(alone.train.run_dir)


def asking_to_stop(step: int, method: Callable[..., Any]) -> Callable[..., Any]:
    def asked(self: Any, *args: Any) -> Any:
        # Before the step, so that at its end the ranks have heard of it.
        signals._asked = self.state.step + 1 == step
        return method(self, *args)

    return asked


def noting(done: list[str], word: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        done.append(word)
        return method(*args, **options)

    return noted
