"""What the demo shows, without training."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from aria_train.config import load_config
from demo import run
from demo.curve import Curve, save_picture, terminal_chart
from demo.shell import DemoError, evaluate_aside, execute, run_script
from demo.summary import STAGES
from tests.tiny import tiny_config

SUMMARY = {
    "stage1_lang": {
        "heldout_loss_before": 8.4,
        "heldout_loss_after": 3.1,
        "unigram_loss": 6.1,
        "bigram_loss": 4.2,
    },
    "stage2_mm": {
        "digits_accuracy_before": 0.1,
        "digits_accuracy_after": 0.93,
        "heldout_text_loss_before": 3.1,
        "heldout_text_loss_after": 3.0,
    },
    "stage3_longctx": {
        "needle_accuracy_before": 0.05,
        "needle_accuracy_after": 0.777,
        "context_length": 1024,
        "digits_accuracy_after": 0.94,
    },
    "stage4_post": {"answer_accuracy_before": 0.02, "answer_accuracy_after": 0.885, "digits_accuracy_after": 0.92},
}
CURVE = Curve(
    training=[(step / 100, 8.5 - 5 * step / 100) for step in range(1, 101)],
    held_out=[(0.0, 8.4), (0.5, 5.0), (1.0, 3.1)],
    references={"unigram": 6.1, "bigram": 4.2},
)


PICTURES = {
    "stage2_mm": ["answers", "experts"],
    "stage3_longctx": ["answers", "needle_text"],
    "stage4_post": ["answers"],
}


def write_stages(root: Path) -> None:
    """The records and reports of four finished stages, each of 100 steps."""
    for stage in STAGES:
        report = root / stage / "report"
        report.mkdir(parents=True)
        (report / "samples.json").write_text(json.dumps([["class Stack:\n", f"    {stage}.items = [<red>]\n"]]))
        for name, points in (("metrics", CURVE.training), ("evaluations", CURVE.held_out)):
            lines = [
                {"step": step, "tokens": round(x * 1e6), "loss": y, "loss/digits": y / 2, "step_seconds": 0.5}
                for step, (x, y) in enumerate(points)
            ]
            accuracies = {
                "answers_accuracy": SUMMARY["stage2_mm"]["digits_accuracy_after"],
                "needle_text_accuracy": 0.5,
            }
            text = "".join(json.dumps({**line, **accuracies, "loss/text": line["loss"]}) + "\n" for line in lines)
            (root / stage / f"{name}.jsonl").write_text(text)
        for kind in PICTURES.get(stage, []):
            for step in (0, 100):
                Image.new("RGB", (4, 4)).save(report / f"{kind}_step_{step:08d}.png")
    Image.new("RGB", (4, 4)).save(root / "timeline.png")
    save_picture(CURVE, "Held-out loss", root / "stage1_lang" / "report" / "loss.png")


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A demo in the working directory with nothing to train with; what it starts is noted."""
    started: list[str] = []

    def train(processes: int, *arguments: str) -> None:
        started.append(f"{processes} x {' '.join(arguments[:2])} ... {arguments[5]}")
        write_stages(Path(arguments[5].removeprefix("train.run_dir=")))

    def evaluate(kind: str, *arguments: str) -> dict[str, float]:
        started.append(f"{kind} {arguments[0]}")
        return {"accuracy": SUMMARY["stage4_post"]["digits_accuracy_after"]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.corpora, "prepare", lambda: started.append("corpora"))
    monkeypatch.setattr(run, "torchrun", train)
    monkeypatch.setattr(run, "evaluate_aside", evaluate)
    monkeypatch.setattr(run, "write_samples", lambda folders: started.append(f"{len(folders)} samples"))
    monkeypatch.setattr(run, "load_config", lambda path: tiny_config(tmp_path, []))
    monkeypatch.setattr(run, "ngram_losses", lambda config: (6.1, 4.2))
    return started


def test_one_curriculum_then_evaluations_then_one_page(demo: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run.main()
    assert demo[:2] == ["corpora", "2 x curriculum configs/small/stage1_lang.yaml ... train.run_dir=runs/demo"]
    # These run at the same time.
    assert sorted(demo[2:]) == ["4 samples", "answers runs/demo/stage4_post", "experts runs/demo/stage2_mm"]
    found = json.loads((run.FULL / "summary.json").read_text())
    assert {stage: set(figures) for stage, figures in found.items()} == {s: set(f) for s, f in SUMMARY.items()}
    assert found["stage1_lang"] == SUMMARY["stage1_lang"]
    assert found["stage4_post"]["digits_accuracy_after"] == 0.92
    page = (run.FULL / "report" / "index.html").read_text()
    # Nothing outside the page is needed to show it.
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    assert page.count("data:image/png;base64,") == 9
    for part in ("make demo</code>", "93.0%", "needle", "stage3_longctx.items = [&lt;red&gt;]", "Which experts see"):
        assert part in page, part
    # The second time there is nothing left to do.
    demo.clear()
    capsys.readouterr()
    run.main()
    assert demo == []
    assert "had run before" in capsys.readouterr().out


def test_a_finished_demo_shows_its_results_again(
    demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stages(run.FULL)
    run.write_atomically(run.FULL / "summary.json", json.dumps(SUMMARY))
    run.write_report(run.FULL, SUMMARY, "make demo")
    run.main()
    assert demo == []
    shown = capsys.readouterr().out
    for fact in ("8.400", "3.100", "6.100", "4.200", "class Stack", "[<red>]", "93.0%", "77.7%", "88.5%", "clean-demo"):
        assert fact in shown, fact


def test_the_quick_demo_is_the_same_with_fewer_tokens() -> None:
    for path in run.CONFIGS:
        full, quick = (load_config(Path(run.__file__).parents[1] / path, some) for some in ((), run.QUICK_OVERRIDES))
        assert quick.total_steps < full.total_steps / 2
        assert quick.model == full.model
        assert quick.data == full.data


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


def test_an_evaluation_aside_says_why_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DemoError, match="ended with status 2"):
        evaluate_aside("experts", str(tmp_path / "nowhere"))
    shown = capsys.readouterr()
    assert "$ aria-train eval experts" in shown.out
    assert "nowhere" in shown.err
