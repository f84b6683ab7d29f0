"""`make demo`: prepares real text and images, trains a small Aria through two stages on two processes, and shows what
it learned.

Every part that is done already is skipped, and training goes on from its newest checkpoint, so an interrupted demo
continues and a finished one shows its results again. Everything it makes is under `data/small/` and `runs/demo/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aria_train.config import RunConfig, load_config
from aria_train.data.loader import validation_batches
from aria_train.data.text.ngram import NgramModel
from aria_train.train.metrics import read_metrics
from demo import multimodal, text
from demo.curve import Curve, save_picture, terminal_chart
from demo.shell import DemoError, run_script, show, torchrun

RUNS = Path("runs/demo")
SUMMARY = RUNS / "summary.json"
PROCESSES = 2
LANGUAGE = "stage1_lang"
PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self):
'''


@dataclass
class LanguageSummary:
    """Mean cross-entropies of the same held-out tokens, in nats per token."""

    heldout_loss_before: float
    heldout_loss_after: float
    unigram_loss: float
    bigram_loss: float


def main() -> None:
    """Runs whatever is left of the demo, then shows everything."""
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
    finished = LANGUAGE in summary and multimodal.STAGE in summary
    if LANGUAGE not in summary:
        text.prepare()
        summary[LANGUAGE] = asdict(run_language())
        write_atomically(SUMMARY, json.dumps(summary, indent=2) + "\n")
    if multimodal.STAGE not in summary:
        summary[multimodal.STAGE] = asdict(multimodal.run_multimodal(RUNS, LANGUAGE, PROCESSES))
        write_atomically(SUMMARY, json.dumps(summary, indent=2) + "\n")
    show_language(LanguageSummary(**summary[LANGUAGE]))
    multimodal.show_multimodal(multimodal.MultimodalSummary(**summary[multimodal.STAGE]), RUNS)
    again = "The demo had run before; these are its results. " if finished else ""
    print(f"\n{again}`make clean-demo` makes the next `make demo` start over.")


def run_language() -> LanguageSummary:
    """Trains stage 1 and leaves its curve and a sample of its text in the run's report folder."""
    run_dir = RUNS / LANGUAGE
    config_file = Path("configs/small") / f"{LANGUAGE}.yaml"
    override = f"train.run_dir={run_dir}"
    torchrun(PROCESSES, "train", str(config_file), override)
    summary = summarise_language(load_config(config_file, [override]))
    save_picture(curve_of(summary), title_of(summary), run_dir / "report" / "loss.png")
    write_atomically(run_dir / "report" / "sample.txt", generate(run_dir, PROMPT))
    return summary


def summarise_language(config: RunConfig) -> LanguageSummary:
    """Held-out losses from the run's record, and n-gram models of the training corpus scored on the same tokens."""
    evaluations = read_metrics(Path(config.train.run_dir) / "evaluations.jsonl")
    paths = [source.path for source in config.data.train]
    corpora = [path for entry in paths for path in ([entry] if isinstance(entry, str) else entry)]
    ngrams = NgramModel.from_corpora(corpora, config.model.vocab_size).score(validation_batches(config))
    return LanguageSummary(evaluations[0]["loss"], evaluations[-1]["loss"], ngrams.unigram, ngrams.bigram)


def generate(run_dir: Path, prompt: str) -> str:
    """The model's continuation of a prompt."""
    sampling = ["--max-new-tokens=160", "--temperature=0.7", "--top-p=0.9"]
    command = ["generate", str(run_dir), f"--prompt={prompt}", *sampling]
    show("aria-train", "generate", str(run_dir), "--prompt=...", *sampling)
    done = subprocess.run([sys.executable, "-m", "aria_train", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DemoError(f"The command above ended with status {done.returncode}.")
    return done.stdout


def show_language(summary: LanguageSummary) -> None:
    """Curve, losses, and text, on the terminal."""
    console = Console(highlight=False)
    report = RUNS / LANGUAGE / "report"
    console.print(terminal_chart(curve_of(summary), title_of(summary), console.width))

    console.print("\nNats per token on held-out text", style="bold")
    table = Table(box=None)
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_row("unigram counts", f"{summary.unigram_loss:.3f}")
    table.add_row("bigram counts", f"{summary.bigram_loss:.3f}")
    table.add_row("Aria before training", f"{summary.heldout_loss_before:.3f}")
    table.add_row("Aria after training", f"{summary.heldout_loss_after:.3f}", style="bold")
    console.print(table)

    width = max(30, console.width // 2 - 2)
    sample = (report / "sample.txt").read_text(encoding="utf-8").rstrip()
    panels = [
        Panel(Text(PROMPT.rstrip()), title="prompt", width=width),
        Panel(Text(sample), title="continuation", width=width),
    ]
    console.print("", Columns(panels, padding=(0, 1)))
    console.print(f"\nloss curve  {report / 'loss.png'}\nsummary     {SUMMARY}\nrun         {RUNS / LANGUAGE}")


def curve_of(summary: LanguageSummary) -> Curve:
    return Curve.read(RUNS / LANGUAGE, {"unigram": summary.unigram_loss, "bigram": summary.bigram_loss})


def title_of(summary: LanguageSummary) -> str:
    before, after = summary.heldout_loss_before, summary.heldout_loss_after
    return f"Stage 1: held-out loss {before:.2f} → {after:.2f} nats per token"


def write_atomically(path: Path, content: str) -> None:
    """A file is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    run_script(main)
