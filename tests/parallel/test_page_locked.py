"""What saves beside the training copy a GPU's tensors into, with a stand-in for CUDA's functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aria_train.parallel.checkpoint.saver import host_memory


def test_page_locked_memory_is_no_larger_than_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is released before the memory is."""
    calls: list[tuple[str, int, int]] = []
    cuda = SimpleNamespace(
        cudaHostRegister=lambda start, size, _: calls.append(("register", start, size)) or 0,
        cudaHostUnregister=lambda start: calls.append(("unregister", start, 0)) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    on_gpu: Any = SimpleNamespace(is_cuda=True, shape=(3, 5), dtype=torch.float32, nbytes=60, numel=lambda: 15)
    memory = host_memory(on_gpu)
    assert (memory.shape, memory.dtype, memory.untyped_storage().nbytes()) == ((3, 5), torch.float32, 60)
    start = memory.data_ptr()
    memory.fill_(1)
    del memory
    assert calls == [("register", start, 60), ("unregister", start, 0)]
