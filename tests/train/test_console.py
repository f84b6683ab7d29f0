"""What a run shows, in a terminal and elsewhere."""

import io
import time

import pytest
import rich.console

from aria_train.train import console
from aria_train.train.console import Console

METRICS = {
    "stage": "stage1_lang",
    "step": 1,
    "tokens": 3_370_000,
    "loss": 5.12355,
    "lr": 3e-4,
    "grad_norm": 0.9123,
    "tokens_per_second": 12_345.6,
}


class Clock:
    """Stands in for the monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def run(shown: Console, clock: Clock, start: int, stop: int, seconds_per_step: float) -> None:
    shown.start(start)
    for step in range(start + 1, stop + 1):
        clock.now += seconds_per_step
        shown.update({**METRICS, "step": step})
    shown.stop()


def test_a_log_file_gets_readable_lines_with_every_fact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Console(200), Clock(monkeypatch), start=100, stop=101, seconds_per_step=1.5)
    line = capsys.readouterr().out.strip()
    facts = ["step 101/200", "3.37M tokens", "loss 5.1235", "lr 3.00e-04", "grad norm 0.912", "12.35K tokens/s"]
    assert all(fact in line for fact in [*facts, "2:28 left", " GiB"]), line


@pytest.mark.parametrize(("seconds_per_step", "most"), [(0.01, 3), (0.2, 25), (3.0, 110)])
def test_a_log_file_is_not_flooded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds_per_step: float, most: int
) -> None:
    run(Console(500), Clock(monkeypatch), start=0, stop=500, seconds_per_step=seconds_per_step)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= most
    assert lines[0].startswith("step 1/500")
    assert lines[-1].startswith("step 500/500")
    assert "left" not in lines[-1]


def test_time_left_follows_the_recent_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    shown = Console(1200)
    shown.start(0)
    for step in range(1, 1001):
        clock.now += 100 if step <= 500 else 61
        shown.update({**METRICS, "step": step})
    assert "3:23:20 left" in capsys.readouterr().out.splitlines()[-1]


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console.rich.console, "Console", lambda **_: terminal)
    shown = Console(200)
    shown.start(100)
    shown.update({**METRICS, "step": 101})
    shown.message("held-out loss [4.5]")
    shown.stop()
    shown.stop()
    text = screen.getvalue()
    assert "held-out loss [4.5]" in text
    assert "step 101/200" in text
    assert "loss 5.1235" in text
    assert text.endswith("\n") or "\x1b[?25h" in text  # the cursor is back


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console(2, enabled=False)
    shown.start(0)
    shown.update({**METRICS, "step": 1})
    shown.message("never")
    shown.stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (131.4, "2:11"), (3600, "1:00:00"), (90_000, "1d 1:00:00")])
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert console.format_duration(seconds) == text


def test_peak_memory_sees_what_was_held_and_freed() -> None:
    before = console.peak_memory_gib()
    held = bytearray(int((before + 0.25) * console.GIB))
    del held
    assert console.peak_memory_gib() >= before + 0.2
