"""`aria-train curriculum`: stages in order, each starting from what the one before it learned.

    files -> stages -> checks of all of them -> for every stage that is not finished: train -> release its memory

The run directories are the whole state. A stage is finished when the checkpoint of its last step is complete; so the
same command, run again after any interruption, goes on in the right stage at the right step. All stages run in one
process group.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from aria_train.config import RunConfig
from aria_train.errors import ConfigError
from aria_train.parallel.job import check_launcher, orderly_end
from aria_train.parallel.mesh import release
from aria_train.stages.checks import check, check_ranks
from aria_train.stages.plan import print_plan
from aria_train.stages.stage import Stage, load_run, run_root
from aria_train.stages.timeline import write_timeline
from aria_train.train.claim import make_run_dir
from aria_train.train.signals import graceful_stop
from aria_train.train.trainer import Trainer


def run_curriculum(args: argparse.Namespace) -> None:
    """Trains the stages, or with `--dry-run` shows what would be done."""
    stages = load_run("curriculum", args.arguments)
    report = check(stages)
    is_main = os.environ.get("RANK", "0") == "0"
    if args.dry_run:
        if is_main:
            print_plan(stages, report)
        _refuse(stages, report.problems)
        return
    check_launcher()
    _refuse(stages, [*check_ranks(stages), *report.problems, *report.absent])
    if is_main:
        print_plan(stages, report)
    train_stages(stages, is_main)


def train_stages(stages: Sequence[Stage], is_main: bool) -> None:
    """Trains every stage that is not finished, in order, and keeps the timeline."""
    if is_main:
        make_run_dir(run_root(stages))
    with graceful_stop(), orderly_end():
        try:
            for number, stage in enumerate(stages, 1):
                if stage.is_finished:
                    continue
                if is_main:
                    _keep_timeline(stages)
                    print(f"\nstage {number} of {len(stages)}: {stage.name}", flush=True)
                train_stage(stage.config)
        finally:
            if is_main:
                _keep_timeline(stages)
    if is_main:
        print(f"\n{len(stages)} stages complete in {run_root(stages)}; their timeline: timeline.png, timeline.jsonl")


def _keep_timeline(stages: Sequence[Stage]) -> None:
    """Writes the timeline; whatever goes wrong with it is said, and training goes on."""
    try:
        write_timeline(stages)
    except Exception as error:  # Drawing can fail in any way; the records that the timeline is made of are complete.
        reason = f"{type(error).__name__}: {error}"
        print(f"the timeline in {run_root(stages)} could not be written ({reason}); the stages go on", file=sys.stderr)


def train_stage(config: RunConfig) -> None:
    """Trains a stage to its end and lets go of its memory."""
    trainer = Trainer(config)
    trainer.run()
    meshes = trainer.meshes
    del trainer
    # The model, its hooks and its optimizer refer to each other.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dist.barrier()
    release(meshes)


def _refuse(stages: Sequence[Stage], problems: Sequence[str]) -> None:
    if problems:
        names = " -> ".join(stage.name for stage in stages)
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{names}: this curriculum cannot be run; nothing was started.\n{listed}")
