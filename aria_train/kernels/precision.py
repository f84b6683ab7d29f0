"""Whether a CPU multiplies bf16. One without instructions for it (before AVX-512, mostly) does so number by number."""

from __future__ import annotations

import time

import torch

_SIZE = 128


def bf16_cost() -> float:
    """How many times as long a matrix product takes this CPU in bf16 as in float32."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(_SIZE, _SIZE, dtype=dtype)
        torch.mm(x, x)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - began)
        seconds.append(min(times))
    return seconds[1] / seconds[0]
