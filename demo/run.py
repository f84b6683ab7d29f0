"""`make demo`: a small Aria through all four stages on two processes, and a page that shows what it learned.

    corpora -> `aria-train curriculum` over configs/small/ -> evaluations -> runs/demo/report/index.html

Every part that is done already is skipped, and training goes on from its newest checkpoint, so an interrupted demo
continues and a finished one shows its results again. `make demo-quick` does the same with few tokens: too few to
learn much from, enough to see all of it work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aria_train.config import load_config
from demo import corpora
from demo.curve import Curve, save_picture, terminal_chart
from demo.report import newest, write_report
from demo.samples import read_samples, write_samples
from demo.shell import evaluate_aside, run_script, torchrun
from demo.summary import LANGUAGE, LONG, MULTIMODAL, POST, STAGES, Summary, evaluations, ngram_losses, summarise

PROCESSES = 2
CONFIGS = [f"configs/small/{name}.yaml" for name in STAGES]
FULL, QUICK = Path("runs/demo"), Path("runs/demo-quick")
QUICK_TOKENS = "24K"
QUICK_OVERRIDES = (
    f"train.max_tokens={QUICK_TOKENS}",
    f"schedule.total_tokens={QUICK_TOKENS}",
    "schedule.warmup_tokens=6K",
    "train.eval_windows=8",
    "checkpoint.interval_steps=1000",
)


def main(root: Path = FULL, overrides: Sequence[str] = ()) -> None:
    """Runs whatever is left of the demo, then shows everything."""
    summary_file, page = root / "summary.json", root / "report" / "index.html"
    finished = summary_file.exists() and page.exists()
    if not finished:
        corpora.prepare()
        torchrun(PROCESSES, "curriculum", *CONFIGS, f"train.run_dir={root}", *overrides)
        summary = evaluate(root)
        write_atomically(summary_file, json.dumps(summary, indent=2) + "\n")
        write_report(root, summary, "make demo" if root == FULL else "make demo-quick")
    show(root, json.loads(summary_file.read_text()))
    again = "The demo had run before; these are its results. " if finished else ""
    print(f"\n{again}`make clean-demo` makes the next one start over.\n\nEverything on one page: {page}")


def evaluate(root: Path) -> Summary:
    """What the stages themselves have not measured, and pictures and samples for the report."""
    with ThreadPoolExecutor() as pool:
        experts = pool.submit(evaluate_aside, "experts", str(root / MULTIMODAL))
        answers = pool.submit(evaluate_aside, "answers", str(root / POST), "data/small/digits_validation")
        write_samples([root / name for name in STAGES])
        ngrams = ngram_losses(load_config(CONFIGS[0]))
        experts.result()
        digits = answers.result()["accuracy"]
    summary = summarise(root, ngrams, load_config(CONFIGS[2]).train.context_length, digits)
    save_picture(curve_of(root, summary), title_of(summary), root / LANGUAGE / "report" / "loss.png")
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal


def show(root: Path, summary: Summary) -> None:
    """Curve, figures of every stage, and text."""
    console = Console(highlight=False)
    console.print(terminal_chart(curve_of(root, summary), title_of(summary), console.width))

    figures = summary[LANGUAGE]
    console.print("\nStage 1: nats per token on held-out text", style="bold")
    table = Table(box=None)
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_row("unigram counts", f"{figures['unigram_loss']:.3f}")
    table.add_row("bigram counts", f"{figures['bigram_loss']:.3f}")
    table.add_row("Aria before training", f"{figures['heldout_loss_before']:.3f}")
    table.add_row("Aria after training", f"{figures['heldout_loss_after']:.3f}", style="bold")
    console.print(table)

    _show_stage(console, root, MULTIMODAL, "Stage 2: text and images", "held-out digits read right", summary, "digits")
    _show_stage(console, root, LONG, "Stage 3: long context", "hidden facts found", summary, "needle")
    _show_stage(console, root, POST, "Stage 4: post-training", "held-out instructions followed", summary, "answer")

    width = max(30, console.width // 2 - 2)
    prompt, said = read_samples(root / LONG)[0]
    panels = [
        Panel(Text(prompt.rstrip()), title="prompt", width=width),
        Panel(Text(said.rstrip()), title="continuation", width=width),
    ]
    console.print("", Columns(panels, padding=(0, 1)))
    console.print(f"\ndigits with answers  {newest(root / MULTIMODAL, 'answers')}")
    console.print(f"timeline             {root / 'timeline.png'}\nsummary              {root / 'summary.json'}")


def _show_stage(console: Console, root: Path, name: str, title: str, what: str, summary: Summary, figure: str) -> None:
    """Accuracy and held-out losses before a stage and after it."""
    console.print(f"\n{title}", style="bold")
    table = Table(box=None)
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    accuracy = (f"{summary[name][f'{figure}_accuracy_{when}']:.1%}" for when in ("before", "after"))
    table.add_row(what, *accuracy, style="bold")
    before, after = evaluations(root / name)[0], evaluations(root / name)[-1]
    for key in before:
        if key.startswith("loss/"):
            table.add_row(f"held-out loss, {key.removeprefix('loss/')}", f"{before[key]:.3f}", f"{after[key]:.3f}")
    console.print(table)


def curve_of(root: Path, summary: Summary) -> Curve:
    figures = summary[LANGUAGE]
    return Curve.read(root / LANGUAGE, {"unigram": figures["unigram_loss"], "bigram": figures["bigram_loss"]})


def title_of(summary: Summary) -> str:
    before, after = (summary[LANGUAGE][f"heldout_loss_{when}"] for when in ("before", "after"))
    return f"Stage 1: held-out loss {before:.2f} → {after:.2f} nats per token"


def write_atomically(path: Path, content: str) -> None:
    """A file is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    if sys.argv[1:] == ["--quick"]:
        run_script(lambda: main(QUICK, QUICK_OVERRIDES))
    else:
        run_script(main)
