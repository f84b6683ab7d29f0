"""Chains of elementwise operations that torch.compile makes one pass over memory of, where a run asks for it.

Only what lies between the products is compiled: weights, collectives and documents stay outside, so that sharding,
adapters and recomputation are none of the compiler's business. A setting of the process, as PyTorch's own backends have
theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import ParamSpec, TypeVar, cast
from zlib import crc32

import torch

from aria_train.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_enabled = False


def compile_chains(enabled: bool, device: torch.device | None = None) -> None:
    """From here on, every `chain` runs compiled, or as it is written.

    Raises ConfigError where torch.compile cannot make anything for the device.
    """
    global _enabled
    if enabled:
        _try(device or torch.device("cpu"))
    _enabled = enabled


def enabled() -> bool:
    return _enabled


def chain(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled when `compile_chains` says so. Tensors alone, and no loop over their sizes."""

    @cache  # torch.compile imports for a second: not before it is wanted
    def compiled(layout: tuple[object, ...]) -> Callable[P, R]:
        # By its name and place in the source the compiler knows which sizes of a function it has seen to vary.
        code = function.__code__.replace(co_name=f"{function.__name__}_{crc32(repr(layout).encode()):x}")
        twin = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
        return cast(Callable[P, R], torch.compile(twin))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled(_layout(args))(*args, **kwargs) if _enabled else function(*args, **kwargs)

    return run


def _layout(args: tuple[object, ...]) -> tuple[object, ...]:
    """What is alike wherever a chain runs for the same part of the model: all but the number of rows. Each has a kernel
    of its own, whose widths are constants; one kernel for several widths could not load several numbers at once."""
    return tuple((x.dtype, x.shape[1:]) if isinstance(x, torch.Tensor) else x for x in args)


def _try(device: torch.device) -> None:
    try:
        torch.compile(_increment)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler's tool chain makes of its absence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"train.compile is true, but torch.compile makes nothing for {device.type} here: {reason}. It needs a C++ "
            "compiler (g++) for a CPU, and Triton, which comes with PyTorch for CUDA, for a GPU; a path to PyTorch "
            f"without spaces ({torch.__file__}); and a whole cache (TORCHINDUCTOR_CACHE_DIR, else torchinductor_USER "
            "in the folder for temporary files), which may be deleted. Mend it, or set train.compile=false: slower, "
            "and everything else is the same."
        ) from error


def _increment(x: torch.Tensor) -> torch.Tensor:
    return x + 1
