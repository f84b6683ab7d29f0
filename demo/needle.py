"""`make needle`: does stage 3 teach the small model to find a fact anywhere in its new, longer context?

    stages 1 and 2 at 256 tokens -> stage 3 at 1,024 with RoPE base 5M     -> the same grid of needles after each
                                 \\> the same stage 3, RoPE base unchanged

Everything is under `runs/needle/`; the figures go into `docs/needle.md`, the heat maps beside it. What is done already
is skipped, and training goes on from its newest checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from aria_train.config import load_config
from aria_train.stages.plan import short
from aria_train.train.metrics import read_metrics
from benchmarks.page import fill
from demo import corpora, text
from demo.shell import evaluate, run_script, torchrun

ROOT = Path("runs/needle")
STAGES = ("stage1_lang", "stage2_mm", "stage3_longctx")
CONFIGS = [f"configs/needle/{name}.yaml" for name in STAGES]
SAME_BASE = "stage3_same_base"
PROCESSES = 2
PAGE, PICTURES = Path("docs/needle.md"), Path("docs/needle")
LENGTHS = (128, 256, 384, 512, 640, 768, 896, 1024)
DEPTHS, TRIALS = 11, 3

SHOWN = {
    "stage2_mm": "after stage 2 (256 tokens, RoPE base 100K)",
    "stage3_longctx": "after stage 3 (1,024 tokens, RoPE base 100K -> 5M)",
    SAME_BASE: "after stage 3 with the RoPE base left at 100K",
}


def main() -> None:
    """Trains whatever is left, evaluates, and writes the page."""
    corpora.prepare()
    corpora.prepare_short_needles()
    torchrun(PROCESSES, "curriculum", *CONFIGS, f"train.run_dir={ROOT}")
    base = load_config(CONFIGS[1]).model.rope_base
    changes = [f"model.rope_base={base}", f"train.run_dir={ROOT / SAME_BASE}", f"stage={SAME_BASE}"]
    torchrun(PROCESSES, "train", CONFIGS[2], *changes, f"checkpoint.init_from={ROOT / STAGES[1]}")
    results = {name: find_needles(ROOT / name) for name in SHOWN}
    write_page(results)


def find_needles(run_dir: Path) -> dict[str, Any]:
    """The grid's result; its picture goes beside the page."""
    options = [f"--haystack={text.CORPUS}_validation", f"--depths={DEPTHS}", f"--trials={TRIALS}"]
    result = evaluate("needle", str(run_dir), *options, "--lengths", *map(str, LENGTHS))
    PICTURES.mkdir(parents=True, exist_ok=True)
    (picture,) = (file for file in result["files"] if file.endswith(".png"))
    shutil.copyfile(picture, PICTURES / f"{run_dir.name}.png")
    return result


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """Puts table and pictures into their place in the documentation."""
    fill(PAGE, "figures of make needle", figures(results))


def figures(results: dict[str, dict[str, Any]]) -> str:
    """Shares of cells and needles found, as a table; the heat maps; what was trained on."""
    lines = ["| model | cells found | needles found | at 256 | at 512 | at 1,024 |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        by_length = dict(zip(result["lengths"], result["teacher_forced"], strict=True))
        at = " | ".join(f"{sum(by_length[length]) / DEPTHS:.1%}" for length in (256, 512, 1024))
        cells, needles = f"{result['cells_found']:.1%}", f"{result['accuracy']:.1%}"
        lines.append(f"| {SHOWN[name]} | {cells} | {needles} | {at} |")
    pictures = [f"![{title}](needle/{name}.png)" for name, title in SHOWN.items()]
    return "\n\n".join(
        ["\n".join(lines), *pictures, "Trained on: " + "; ".join(map(_cost, (*STAGES, SAME_BASE))) + "."]
    )


def _cost(name: str) -> str:
    steps = read_metrics(ROOT / name / "metrics.jsonl")
    minutes = sum(step["step_seconds"] for step in steps) / 60
    return f"{name} {short(steps[-1]['tokens'])} tokens in {minutes:.0f} minutes"


if __name__ == "__main__":
    run_script(main)
