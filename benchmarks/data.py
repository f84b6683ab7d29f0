"""The data path, with and without images, beside the training step it feeds."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from aria_train.config import RunConfig, load_config
from aria_train.data.loader import Blend
from aria_train.train.trainer import Trainer
from benchmarks.measure import Run, compare, forget
from benchmarks.table import Row

DATA = Path("data/small")
CONFIGS = {"text": "stage1_lang", "text and images": "stage2_mm"}


def rows(turns: int) -> list[Row]:
    """How many times faster one worker makes the windows of a step than one process takes the step. The corpora are
    those of `make demo-data`; cold ones are read from the disk."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, name in CONFIGS.items():
            config = small(name, Path(folder))
            for state in ("warm", "cold"):
                comparison = compare(making(config, cold=state == "cold"), taking(config), turns)
                shape = f"{kind}, {state}, {config.train.global_batch_size} windows of {config.train.context_length}"
                found.append(Row("data of a step, one worker", "the step itself", comparison, shape))
                print(f"  {shape}: {found[-1].comparison.ratio:.1f}x", flush=True)
    return found


def small(name: str, folder: Path) -> RunConfig:
    overrides = ["parallel.expert_parallel_size=1", "checkpoint.init_from=null", "data.workers=1"]
    return load_config(f"configs/small/{name}.yaml", [f"train.run_dir={folder / name}", *overrides])


def making(config: RunConfig, cold: bool) -> Run:
    """Each run makes the windows of the next step."""
    blend, steps, windows = Blend(config), itertools.count(), config.train.global_batch_size
    files = [path for path in DATA.rglob("*") if path.is_file() and "raw" not in path.parts]

    def run() -> None:
        if cold:
            forget(files)
        first = next(steps) * windows
        blend.micro_batch(range(first, first + windows))

    return run


def taking(config: RunConfig) -> Run:
    """Each run takes a step, on batches that are at hand."""
    with tempfile.TemporaryDirectory(dir=Path(config.train.run_dir).parent) as folder:
        train = config.train.model_copy(update={"run_dir": folder})
        trainer = Trainer(config.model_copy(update={"train": train}))
        batches = itertools.cycle(list(itertools.islice(trainer.loader, 4)))
        trainer.loader.close()
        trainer.watchdog.stop()
    return lambda: trainer._step(next(batches))
