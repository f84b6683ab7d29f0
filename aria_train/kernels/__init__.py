"""What the model computes most, in the fewest passes over memory that a CPU can do it in.

PyTorch strings together one pass per multiplication, each with a fresh tensor and, for autograd, a kept one. Here each
is one operation with a backward pass of its own: buffers are written in place, in blocks that stay in cache, and what
is cheap to compute again is not kept. Plain tensor operations throughout: nothing to compile. These functions are for
CPU tensors; `on_cpu` and `by_hand` are how callers choose. `compiled.py` is the other way to the same end, on any
device, and the sums of `routing.py` serve any too; `fp8.py` is for GPUs alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aria_train.kernels import compiled

_BLOCK = 1 << 18
"""Elements that a chain of operations works on at a time: with its few buffers it stays in the second-level cache."""


def on_cpu(x: Tensor) -> bool:
    """Whether to take a function of this package rather than PyTorch's own. Fake tensors stand for a GPU's."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def by_hand(x: Tensor) -> bool:
    """The same for what torch.compile makes too, and then is left to it."""
    return on_cpu(x) and not compiled.enabled()


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it: one without them, before AVX-512 in general, multiplies number by
    number, a large product in hundreds of times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices over the first dimension of x, about `_BLOCK` elements each."""
    num_rows = x.shape[0]
    rows = max(1, _BLOCK * num_rows // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, num_rows, rows))
