"""One process's part in a job of several: an orderly end whatever happens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from aria_train.errors import UserError


@contextmanager
def orderly_end() -> Iterator[None]:
    """Around all that a rank does: ranks that finish wait for each other, of those that meet the same error one speaks,
    and the process group ends."""
    try:
        yield
        if dist.is_initialized():
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
