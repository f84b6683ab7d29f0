"""Work and time: FLOPs by activated parameters, tokens per second at a given utilisation, days."""

from __future__ import annotations

from dataclasses import dataclass

from aria_train.config import RunConfig
from aria_train.data.work import forward_flops

PEAK_TFLOPS = {"a100-40": 312, "a100": 312, "h100": 989, "h200": 989, "b200": 2250, "b300": 2250}
"""Dense bf16."""


@dataclass
class Speed:
    flops_per_token: float
    """Forward and backward, by the parameters a token activates and causal attention over whole windows; what
    recomputation adds is not counted."""
    tokens_per_second: float
    seconds_per_step: float
    days: float


def flops_per_token(config: RunConfig, patches_per_window: int = 0) -> float:
    """Forward and backward; the backward pass is twice the forward pass."""
    length = config.train.context_length
    images = [patches_per_window] if patches_per_window else []
    return 3 * forward_flops([length], images, config.model) / length


def speed(config: RunConfig, world: int, peak_tflops: float, utilisation: float) -> Speed:
    """At a utilisation of the device's peak (0.4 = 40%)."""
    flops = flops_per_token(config)
    rate = world * peak_tflops * 1e12 * utilisation / flops
    tokens = config.total_steps * config.tokens_per_step
    return Speed(flops, rate, config.tokens_per_step / rate, tokens / rate / 86400)
