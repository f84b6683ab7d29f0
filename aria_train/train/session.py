"""One process's part in a training job: start, run, and an orderly end whatever happens."""

from __future__ import annotations

import os
import zlib

import torch.distributed as dist

from aria_train.config import RunConfig, check_world
from aria_train.errors import UserError
from aria_train.train.trainer import Trainer


def run_stage(config: RunConfig) -> None:
    """Trains a stage on the ranks torchrun started, or on this process alone."""
    # Before any rank waits for another: a layout that cannot be is refused at once.
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    try:
        Trainer(config).run()
        dist.barrier()
    except UserError as error:
        error.spokesman = _first_to_report(str(error))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _first_to_report(message: str) -> bool | None:
    """Whether no other rank has reported this error; None if the ranks have not met yet."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    return bool(store.add(f"reported/{zlib.crc32(message.encode())}", 1) == 1)
