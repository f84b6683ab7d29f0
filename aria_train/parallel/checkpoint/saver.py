"""Saving beside the training: the step waits for a copy in memory, not for the disk.

The copy lies in host memory that is kept from one save to the next, page-locked where it comes from a GPU. A thread
writes and publishes it; its ranks talk over a process group of their own, which no step waits for.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train.parallel.checkpoint.manifest import Manifest
from aria_train.parallel.checkpoint.storage import Folder
from aria_train.parallel.checkpoint.writing import SaveFailed, save


class Saver:
    """Saves one checkpoint at a time. All ranks make one, and call it alike.

    A save that fails for want of space or the like is reported through `on_failure` and training goes on; `finish`
    raises it, if it was the last.
    """

    def __init__(self, asynchronous: bool, on_failure: Callable[[str], None]) -> None:
        self._asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._on_failure = on_failure
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, target: Folder, tensors: Mapping[str, Tensor], manifest: Manifest, after: Callable[[], None]
    ) -> None:
        """Saves the tensors as they are now; `after` runs once they are published. Waits for the save before."""
        self.wait()
        self._error = None
        if not self._asynchronous:
            self._write(target, tensors, manifest, after, None)
            self._raise_defects()
            return
        copied = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            done = torch.cuda.Event()
            done.record()
        arguments = (target, copied, manifest, after, done)
        # A daemon: an interrupted process must not wait for a write that other ranks no longer take part in.
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way. Raises SaveFailed if the last one failed."""
        self.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Lets go of everything. After an error elsewhere the save under way gets a minute to end."""
        if self._thread is not None:
            self._thread.join(60)
        if self._group is not None and (self._thread is None or not self._thread.is_alive()):
            dist.destroy_process_group(self._group)
            self._group = None
        self._copies.clear()  # with them goes what page-locks them

    def wait(self) -> None:
        """Waits for the save under way, whether it fails or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._raise_defects()

    def _raise_defects(self) -> None:
        if self._error is not None and not isinstance(self._error, SaveFailed):
            raise self._error

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        source = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = host_memory(source)
        # On a GPU this is queued behind the step and before the next one's update; nothing waits here.
        copy.copy_(source.detach(), non_blocking=True)
        return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy

    @torch.no_grad()
    def _write(
        self,
        target: Folder,
        tensors: Mapping[str, Tensor],
        manifest: Manifest,
        after: Callable[[], None],
        copied: torch.cuda.Event | None,
    ) -> None:
        try:
            if copied is not None:
                torch.cuda.set_device(copied.device)  # a thread starts on the first, where every rank's would take room
                copied.synchronize()
            save(target, tensors, manifest, self._group)
            after()
        except SaveFailed as error:
            self._error = error
            self._on_failure(str(error))
        except BaseException as error:
            self._error = error


def host_memory(like: Tensor) -> Tensor:
    """Memory on the host for a tensor like this one, page-locked if that is on a GPU.

    PyTorch's own page-locked memory comes in powers of two: a copy of Aria would take nearly twice its size.
    """
    if not like.is_cuda or not like.numel():
        return torch.empty_like(like, device="cpu")
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shares no page with anything
    memory = torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)))  # 1: portable
    weakref.finalize(memory, cuda.cudaHostUnregister, memory.data_ptr())
    return memory
