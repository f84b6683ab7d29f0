"""One process's part in a training job."""

from __future__ import annotations

import os

from aria_train.config import RunConfig, check_world
from aria_train.parallel.job import check_launcher, orderly_end
from aria_train.train.replay import replay_step
from aria_train.train.signals import graceful_stop
from aria_train.train.trainer import Trainer


def run_stage(config: RunConfig, replay: int | None = None) -> None:
    """Trains a stage on the ranks torchrun started, or on this process alone; or takes one step of it again."""
    check_launcher()
    # Before any rank waits for another: a layout that cannot be is refused at once.
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    with graceful_stop(), orderly_end():
        if replay is None:
            Trainer(config).run()
        else:
            replay_step(config, replay)
