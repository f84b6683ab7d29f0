"""The second half of the demo: the model of stage 1 learns to see."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aria_train.train.metrics import read_metrics
from demo import images
from demo.shell import torchrun

STAGE = "stage2_mm"


@dataclass
class MultimodalSummary:
    """Share of held-out handwritten digits read right, and held-out text loss in nats per token."""

    digits_accuracy_before: float
    digits_accuracy_after: float
    heldout_text_loss_before: float
    heldout_text_loss_after: float


def run_multimodal(runs: Path, language: str, processes: int) -> MultimodalSummary:
    """Trains stage 2 from the weights of stage 1."""
    images.prepare()
    run_dir = runs / STAGE
    overrides = [f"train.run_dir={run_dir}", f"checkpoint.init_from={runs / language}"]
    torchrun(processes, "train", f"configs/small/{STAGE}.yaml", *overrides)
    evaluations = read_metrics(run_dir / "evaluations.jsonl")
    last_sheet = run_dir / "report" / f"answers_step_{evaluations[-1]['step']:08d}.png"
    shutil.copy(last_sheet, contact_sheet(runs))
    return summarise(evaluations)


def summarise(evaluations: list[dict[str, Any]]) -> MultimodalSummary:
    """From the run's own evaluations, before the first step and after the last."""
    before, after = evaluations[0], evaluations[-1]
    return MultimodalSummary(
        before["answers_accuracy"], after["answers_accuracy"], before["loss/text"], after["loss/text"]
    )


def contact_sheet(runs: Path) -> Path:
    """Held-out digits with the model's answers beside them."""
    return runs / STAGE / "report" / "contact_sheet.png"


def show_multimodal(summary: MultimodalSummary, runs: Path) -> None:
    """Accuracy and losses, on the terminal."""
    console = Console(highlight=False)
    evaluations = read_metrics(runs / STAGE / "evaluations.jsonl")
    console.print("\nStage 2: text and images", style="bold")
    table = Table(box=None)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    accuracy = (f"{value:.1%}" for value in (summary.digits_accuracy_before, summary.digits_accuracy_after))
    table.add_row("held-out digits read right", *accuracy, style="bold")
    for key, before in evaluations[0].items():
        if key.startswith("loss/"):
            table.add_row(f"held-out loss, {key.removeprefix('loss/')}", f"{before:.3f}", f"{evaluations[-1][key]:.3f}")
    console.print(table)
    console.print(f"\nimages with the model's answers  {contact_sheet(runs)}\nrun  {runs / STAGE}")
