"""Losses that keep the router healthy: load balance over groups of experts, and z-loss.

The balance loss is the device-level form of DeepSeekMoE (arXiv 2401.06066, equation 15) with Aria's groups of
fine-grained experts in place of devices (arXiv 2410.05993, section 2.1); groups of one expert give the Switch loss
(arXiv 2101.03961, equation 4). z-loss is ST-MoE's (arXiv 2202.08906, equation 5). All in float32, coefficient 1.

Shape legend: T tokens, E experts, G groups, L layers (any leading shape in `grouped_balance`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(router_probs: Tensor, expert_counts: Tensor, top_k: int, group_size: int = 8) -> Tensor:
    """`G * sum_g f_g P_g`: 1 when assignments are uniform, G when one group takes everything.

    router_probs: [T, E], softmax over all experts; carries the gradient.
    expert_counts: [E], assignments to each expert, over these tokens or over more (all ranks, the whole global batch).
    top_k: experts per token; `expert_counts` sums to top_k times the tokens it was counted over.
    group_size: consecutive experts balanced as one; must divide E.
    """
    assert expert_counts.shape == router_probs.shape[-1:], "one count per expert"
    num_counted = expert_counts.double().sum() / top_k
    load = expert_counts.double() / (top_k * num_counted).clamp(min=1)
    return grouped_balance(router_probs.float().mean(0), load.float(), group_size)


def z_loss(router_logits: Tensor) -> Tensor:
    """Mean over tokens of the squared log-partition of the router, [T, E] -> scalar."""
    return router_logits.float().logsumexp(-1).square().mean()


def grouped_balance(mean_probs: Tensor, load: Tensor, group_size: int) -> Tensor:
    """The balance loss from its two factors, [..., E] each: mean probability P (with gradient) and load share f."""
    num_experts = load.shape[-1]
    if num_experts % group_size:
        raise ValueError(f"{num_experts} experts cannot be split into groups of {group_size}")
    num_groups = num_experts // group_size
    load_G = load.detach().unflatten(-1, (num_groups, group_size)).sum(-1)
    probs_G = mean_probs.unflatten(-1, (num_groups, group_size)).sum(-1)
    return num_groups * (load_G * probs_G).sum(-1)


def load_share(expert_counts: Tensor) -> Tensor:
    """f = c / (k T), [..., E]; uniform where nothing has been counted yet."""
    total = expert_counts.double().sum(-1, keepdim=True)
    uniform = torch.full_like(expert_counts, 1 / expert_counts.shape[-1], dtype=torch.float64)
    return torch.where(total > 0, expert_counts.double() / total.clamp(min=1), uniform).float()
