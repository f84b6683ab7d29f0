"""The record of a run: what is written, what a kill leaves, what a resumed run makes of it."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aria_train.config import LoggingConfig
from aria_train.errors import ConfigError
from aria_train.train.metrics import MetricsWriter, read_metrics

FILES = ("metrics.jsonl", "evaluations.jsonl")


def step_metrics(step: int) -> dict[str, object]:
    return {
        "stage": "stage1_lang",
        "step": step,
        "tokens": step * 4096,
        "loss": 10 / (step + 0.1),
        "lr": 0.1 * step / 3,
    }


def train(run_dir: Path, start: int, stop: int) -> None:
    """What a trainer logs from after `start` to `stop`, evaluating before the first step and every third."""
    writer = MetricsWriter(run_dir, LoggingConfig(), {}, resume_step=start)
    for step in range(start, stop + 1):
        if step > start:
            writer.log_step(step_metrics(step))
        if step % 3 == 0:
            writer.log_evaluation(step_metrics(step))
    writer.close()


def contents(run_dir: Path) -> list[bytes]:
    return [(run_dir / name).read_bytes() for name in FILES]


def test_a_line_keeps_every_digit(tmp_path: Path) -> None:
    train(tmp_path, 0, 5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [step_metrics(step) for step in range(1, 6)]


@pytest.mark.parametrize("checkpoint", [0, 1, 3, 6])
@pytest.mark.parametrize("torn", [b"", b'{"stage": "stage1_lang", "st', b'{"step": 2}', b"\0\0\0\n"])
def test_killed_and_resumed_files_equal_uninterrupted_ones(tmp_path: Path, checkpoint: int, torn: bytes) -> None:
    train(tmp_path / "whole", 0, 10)
    train(tmp_path / "killed", 0, 7)
    for name in FILES:
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(torn)
    train(tmp_path / "killed", checkpoint, 10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(FILES)


def test_sigkill_loses_no_line_that_was_logged(tmp_path: Path) -> None:
    program = f"""
        from aria_train.config import LoggingConfig
        from aria_train.train.metrics import MetricsWriter
        writer = MetricsWriter({str(tmp_path)!r}, LoggingConfig(), {{}})
        for step in range(1, 1000):
            writer.log_step({{"step": step}})
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    seen += [int(line) for line in process.stdout]
    process.wait()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][: len(seen)] == seen


def test_a_file_being_written_reads_up_to_its_last_whole_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_lines_that_cannot_be_written_come_once_there_is_room(tmp_path: Path) -> None:
    """And training hears of it once."""
    said: list[str] = []
    writer = MetricsWriter(tmp_path, LoggingConfig(), {}, say=said.append)
    file = tmp_path / "metrics.jsonl"
    writer.log_step(step_metrics(1))
    writer.close()
    file.rename(tmp_path / "aside")
    file.symlink_to("/dev/full")
    for step in (2, 3):
        writer.log_step(step_metrics(step))
    assert len(said) == 1
    assert "metrics.jsonl cannot be written: No space left on device" in said[0]
    (tmp_path / "aside").rename(file)
    writer.log_step(step_metrics(4))
    assert "can be written again" in said[1]
    writer.close()
    assert read_metrics(file) == [step_metrics(step) for step in range(1, 5)]


def test_not_a_number_becomes_null_and_any_json_reader_reads_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, LoggingConfig(), {})
    writer.log_step({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None}


def test_an_evaluation_is_recorded_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, LoggingConfig(), {})
    for _ in range(2):
        writer.log_evaluation(step_metrics(0))
    writer.close()
    assert read_metrics(tmp_path / "evaluations.jsonl") == [step_metrics(0)]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock is set back between one start and the next."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, stop, clock in ((0, 3, 1.7e9), (3, 7, 1.6e9), (4, 10, 1.5e9)):
        monkeypatch.setattr(time, "time", lambda: clock)  # noqa: B023
        writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True, interval_steps=2), {}, resume_step=start)
        for step in range(start + 1, stop + 1):
            writer.log_step(step_metrics(step))
        writer.log_evaluation(step_metrics(stop))
        writer.close()
    events = loading.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10]
    assert events.Scalars("evaluation/loss")[-1].value == pytest.approx(step_metrics(10)["loss"])


def test_wandb_offline_needs_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for start in (0, 2):
        writer = MetricsWriter(tmp_path, LoggingConfig(wandb="offline"), {"train": {"seed": 0}}, resume_step=start)
        for step in range(start + 1, start + 4):
            writer.log_step(step_metrics(step))
        writer.close()
    recorded = list((tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(recorded) == 2
    assert len({path.name for path in recorded}) == 1  # the same run to wandb


def test_wandb_online_without_an_account_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="logging.wandb=offline"):
        MetricsWriter(tmp_path, LoggingConfig(wandb="online"), {})


@pytest.mark.parametrize(
    ("module", "logging"),
    [
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True)),
        ("wandb", LoggingConfig(wandb="offline")),
    ],
)
def test_an_absent_package_is_named_with_the_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, logging: LoggingConfig
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'aria_train\[.*set logging\."):
        MetricsWriter(tmp_path, logging, {})
