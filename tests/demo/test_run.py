"""What the demo shows, without training."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from demo import run
from demo.curve import Curve, save_picture, terminal_chart
from demo.shell import DemoError, execute, run_script

SUMMARY = {"heldout_loss_before": 8.4, "heldout_loss_after": 3.1, "unigram_loss": 6.1, "bigram_loss": 4.2}
SEEING = {
    "digits_accuracy_before": 0.1,
    "digits_accuracy_after": 0.93,
    "heldout_text_loss_before": 3.1,
    "heldout_text_loss_after": 3.0,
}
CURVE = Curve(
    training=[(step / 100, 8.5 - 5 * step / 100) for step in range(1, 101)],
    held_out=[(0.0, 8.4), (0.5, 5.0), (1.0, 3.1)],
    references={"unigram": 6.1, "bigram": 4.2},
)


def write_run(folder: Path) -> None:
    """A finished run's record and report."""
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "sample.txt").write_text("        self.items = [red]\n")
    for name, points in (("metrics", CURVE.training), ("evaluations", CURVE.held_out)):
        lines = [json.dumps({"step": step, "tokens": x * 1e6, "loss": y}) for step, (x, y) in enumerate(points)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished demo in the working directory; starting anything would fail."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.chdir(tmp_path)
    for name in ("torchrun", "generate"):
        monkeypatch.setattr(run, name, refuse)
    monkeypatch.setattr(run.text, "prepare", refuse)
    monkeypatch.setattr(run.multimodal, "run_multimodal", refuse)
    write_run(tmp_path / run.RUNS / run.LANGUAGE)
    seeing = tmp_path / run.RUNS / run.multimodal.STAGE
    seeing.mkdir()
    lines = [json.dumps({"step": step, "loss/digits": 4.0 / (step + 1)}) for step in (0, 100)]
    (seeing / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / run.SUMMARY).write_text(json.dumps({run.LANGUAGE: SUMMARY, run.multimodal.STAGE: SEEING}))
    return tmp_path


def test_a_finished_demo_shows_its_results_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main()
    shown = capsys.readouterr().out
    for fact in ("8.400", "3.100", "6.100", "4.200", "class Stack", "self.items = [red]", "93.0%", "make clean-demo"):
        assert fact in shown, fact


def test_an_unfinished_demo_goes_on_where_it_is_and_notes_a_stage_when_it_is_done(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / run.SUMMARY).unlink()
    steps: list[str] = []

    def note(step: str) -> None:
        done = json.loads(run.SUMMARY.read_text()) if run.SUMMARY.exists() else {}
        steps.append(f"{step}, {len(done)} done")

    def summarise(config: object) -> run.LanguageSummary:
        note("summarise")
        return run.LanguageSummary(**SUMMARY)

    def generate(run_dir: Path, prompt: str) -> str:
        note("generate")
        return "        pass\n"

    def see(*arguments: object) -> run.multimodal.MultimodalSummary:
        note("see")
        return run.multimodal.MultimodalSummary(**SEEING)

    monkeypatch.setattr(run.text, "prepare", lambda: note("prepare"))
    monkeypatch.setattr(run, "torchrun", lambda *arguments: note("train"))
    monkeypatch.setattr(run, "load_config", lambda *arguments: None)
    monkeypatch.setattr(run, "summarise_language", summarise)
    monkeypatch.setattr(run, "generate", generate)
    monkeypatch.setattr(run.multimodal, "run_multimodal", see)
    run.main()
    first = ["prepare, 0 done", "train, 0 done", "summarise, 0 done", "generate, 0 done"]
    assert steps == [*first, "see, 1 done"]
    assert json.loads(run.SUMMARY.read_text()) == {"stage1_lang": SUMMARY, "stage2_mm": SEEING}
    assert "        pass" in capsys.readouterr().out
    # A stage that is done is not run again for the sake of the next.
    run.SUMMARY.write_text(json.dumps({run.LANGUAGE: SUMMARY}))
    steps.clear()
    run.main()
    assert steps == ["see, 1 done"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_chart_fits_and_names_every_line(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=width, highlight=False).print(terminal_chart(CURVE, "Held-out loss", width))
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= width
    for label in ("held-out 3.10", "unigram 6.10", "bigram 4.20", "million tokens"):
        assert label in shown, label
    # Losses fall from the upper left to the lower right.
    rows = [line for line in shown.splitlines() if "│" in line]
    drawn = [[at for at, symbol in enumerate(row) if "\u2801" <= symbol <= "\u28ff"] for row in rows]
    assert min(drawn[0]) < 10 < width - 30 < max(at for row in drawn[-8:] for at in row)


def test_lines_that_end_together_keep_their_labels() -> None:
    curve = Curve(CURVE.training, [(0.0, 8.4), (1.0, 4.2)], {"unigram": 4.21, "bigram": 4.2})
    shown = terminal_chart(curve, "Close", 80).plain
    assert all(label in shown for label in ("held-out 4.20", "unigram 4.21", "bigram 4.20"))


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    save_picture(CURVE, "Held-out loss", tmp_path / "report" / "loss.png")
    with Image.open(tmp_path / "report" / "loss.png") as image:
        assert image.size == (1350, 750)


def test_a_failing_command_ends_the_script_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chdir", lambda path: None)

    def main() -> None:
        execute(["false"])

    with pytest.raises(DemoError, match="status 1"):
        main()
    with pytest.raises(SystemExit, match="Run the same make target again"):
        run_script(main)
