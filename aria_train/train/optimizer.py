"""Fused AdamW on the shards, learning-rate schedules by tokens, and gradient clipping across both meshes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aria_train.config import OptimizerConfig, RunConfig
from aria_train.model.aria import part_of
from aria_train.parallel.shard import is_expert_parameter
from aria_train.train.multi_tensor import MultiTensorAdamW, find_update, local


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only. Dense and expert parameters lie on different meshes, so they form groups of
    their own: a fused kernel takes tensors of one mesh. Each group's `lr_scale` is its part's."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (is_expert_parameter(name), parameter.ndim > 1, config.lr_scale.get(part_of(name), 1.0))
            groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (_, decayed, scale), parameters in groups.items()
    ]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.kernel == "torch":
        optimizer = torch.optim.AdamW(settings, fused=True, **options)
    else:
        device = next(model.parameters()).device
        optimizer = MultiTensorAdamW(settings, find_update(config.kernel, device), **options)
    create_moments(optimizer)
    return optimizer


def create_moments(optimizer: torch.optim.AdamW) -> None:
    """Before the first step, which would put them between what the step itself needs: memory in pieces. So what does
    not fit fails at the start, too."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def schedule_tokens(config: RunConfig) -> int:
    """Tokens at which the decay of the learning rate ends."""
    return config.schedule.total_tokens or config.total_steps * config.tokens_per_step


def learning_rate(config: RunConfig, tokens: int) -> float:
    """Learning rate of the step that begins after `tokens` tokens."""
    schedule, peak, total = config.schedule, config.optimizer.lr, schedule_tokens(config)
    # The first step already moves, and the last one is at the end of the schedule.
    done = tokens + config.tokens_per_step
    if done < schedule.warmup_tokens:
        return peak * done / schedule.warmup_tokens
    floor = peak * schedule.min_lr_ratio
    if schedule.kind == "constant":
        return peak
    begin = schedule.warmup_tokens
    if schedule.kind == "wsd":
        begin = max(begin, total - schedule.decay_tokens)
    progress = min(1.0, max(0.0, (done - begin) / max(1, total - begin)))
    if schedule.kind == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float, num_replicas: int) -> Tensor:
    """Scales all gradients so that their global norm is at most `max_norm` (0: no limit). Returns the norm before.

    Shards of dense and expert parameters are disjoint over the ranks of a replica, so one sum over the world, divided
    by the number of replicas, is the whole model's.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    # In float64: float32 sums of a large tensor are off by 1e-5, depending on how it is cut.
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64))
    total = norms.square().sum()
    dist.all_reduce(total)
    norm = (total / num_replicas).sqrt().float()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / norm.clamp(min=max_norm)).to(gradients[0].dtype))
    return norm
