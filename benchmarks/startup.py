"""From the command to the end of the first step, beside what importing torch takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks.measure import compare
from benchmarks.table import Row

CONFIG = "configs/small/stage1_lang.yaml"


def rows(turns: int) -> list[Row]:
    """Until the step is shown; one process, without the evaluation before it. The corpora are those of
    `make demo-data`."""
    overrides = [
        "parallel.expert_parallel_size=1", "train.max_steps=1", "data.validation=[]", "train.eval_interval_steps=0",
        "checkpoint.interval_steps=0",
    ]  # fmt: skip

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["train", CONFIG, f"train.run_dir={folder}/run", *overrides]
            command = [sys.executable, "-u", "-m", "aria_train", *arguments]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert any(line.startswith("step 1/1 ") for line in process.stdout), "it ended before its first step"
                process.kill()

    def torch_alone() -> None:
        subprocess.run([sys.executable, "-c", "import torch"], check=True)

    comparison = compare(ours, torch_alone, turns)
    return [
        Row("start to the end of a first step", "import torch", comparison, "stage 1 of configs/small, one process")
    ]
