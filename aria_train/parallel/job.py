"""One process's part in a job of several: an orderly end whatever happens."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from aria_train.errors import EXIT_USER_ERROR, ConfigError, Stopped, UserError

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
    except Stopped:
        _leave_group()
        raise
    except UserError as error:
        error.spokesman = _first_to_report(str(error))
        _leave_group_alone(EXIT_USER_ERROR)
        raise
    except BaseException as error:
        cut_off = isinstance(error, Exception) and _reported_elsewhere()
        _leave_group_alone(EXIT_USER_ERROR if cut_off else 130 if isinstance(error, KeyboardInterrupt) else 1)
        if not cut_off:
            raise
        silent = UserError("cut off by another rank's error")
        silent.spokesman = False
        raise silent from None
    _leave_group()


def _leave_group() -> None:
    """As all ranks do."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_group_alone(status: int) -> None:
    """While the others may be in the midst of a collective. NCCL would wait for them, and they wait for this rank: then
    the process ends without, once it has said why, and its launcher ends the others."""
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "gloo":
        atexit.register(_end_at_once, status)
    else:
        _leave_group()


def _end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_to_report(message: str) -> bool | None:
    """Whether no other rank has reported this error; None if the ranks have not met yet."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    number = zlib.crc32(message.encode(errors="replace"))  # the paths in it may be no text
    try:
        store.add(_REPORTED, 1)
        return bool(store.add(f"{_REPORTED}/{number}", 1) == 1)
    except RuntimeError:  # the store has left with the rank that held it: better twice than never
        return True


def _reported_elsewhere() -> bool:
    """Whether another rank has left with an error of the user's: then collectives with it fail on the others."""
    if not dist.is_initialized():
        return False
    with contextlib.suppress(RuntimeError):  # the store may have left too
        return bool(dist.distributed_c10d._get_default_store().add(_REPORTED, 0) > 0)
    return False
