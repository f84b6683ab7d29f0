"""From the command to the end of the first step, beside what importing torch takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.measure import compare
from benchmarks.table import Row

CONFIG = "configs/small/stage1_lang.yaml"


def rows(turns: int) -> list[Row]:
    """One step on one process, without the evaluation before it. The corpora are those of `make demo-data`."""
    overrides = [
        "parallel.expert_parallel_size=1", "train.max_steps=1", "data.validation=[]", "train.eval_interval_steps=0",
        "checkpoint.interval_steps=0",
    ]  # fmt: skip

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run("-m", "aria_train", "train", CONFIG, f"train.run_dir={folder}/run", *overrides)

    comparison = compare(ours, lambda: run("-c", "import torch"), turns)
    return [
        Row("start to the end of a first step", "import torch", comparison, "stage 1 of configs/small, one process")
    ]


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env={**os.environ})
