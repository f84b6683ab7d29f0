"""One process's part in a job of several: an orderly end whatever happens."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from aria_train.errors import ConfigError, UserError

_REPORTED = "reported"
"""Counter in the job's store of the ranks that have left with an error of the user's."""


def check_launcher() -> None:
    """Raises ConfigError where SLURM has started several processes that do not know of each other."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"srun started {tasks} processes, each of which would train on its own in the same run directory. Submit "
            "the run with `aria-train launch CONFIG`, or have srun start one launcher per node: launch/torchrun.sh."
        )


@contextmanager
def orderly_end() -> Iterator[None]:
    """Around all that a rank does: ranks that finish wait for each other, of those that meet the same error one speaks,
    one that is cut off because another met an error stays silent, and the process group ends."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    except UserError as error:
        error.spokesman = _first_to_report(str(error))
        raise
    except Exception:
        if not _reported_elsewhere():
            raise
        silent = UserError("cut off by another rank's error")
        silent.spokesman = False
        raise silent from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _first_to_report(message: str) -> bool | None:
    """Whether no other rank has reported this error; None if the ranks have not met yet."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    store.add(_REPORTED, 1)
    return bool(store.add(f"{_REPORTED}/{zlib.crc32(message.encode())}", 1) == 1)


def _reported_elsewhere() -> bool:
    """Whether another rank has left with an error of the user's: then collectives with it fail on the others."""
    if not dist.is_initialized():
        return False
    with contextlib.suppress(RuntimeError):  # the store may have left too
        return bool(dist.distributed_c10d._get_default_store().add(_REPORTED, 0) > 0)
    return False
