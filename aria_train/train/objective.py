"""What is minimised, and the sums it is made of.

    cross-entropy summed over targets / targets of the global batch
    + sum over layers of  balance_coefficient * balance loss + z_coefficient * z-loss

Every term is a sum over tokens divided by a total of the global batch, so the gradient is the sum of what ranks and
micro-batches contribute, whatever their number or share of tokens.

The balance loss multiplies two averages: each expert's load f and its mean probability P (see `moe/balance.py`). P
carries the gradient and is summed like the rest. f must be known before the first backward pass, when later
micro-batches have not been routed yet: it is the load over the previous step's whole global batch. So the scope is as
wide as it can be, no collective waits in a forward pass, and accumulation and layout change nothing. The reported
balance loss is the exact one of the step's own global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aria_train.config import ModelConfig
from aria_train.model import AriaOutput
from aria_train.moe.balance import grouped_balance, load_share


@dataclass
class Totals:
    """Totals over the global batch, known before its first forward pass."""

    targets: float
    tokens: float
    images: int = 0


def objective(output: AriaOutput, totals: Totals, previous_counts: Tensor, config: ModelConfig) -> Tensor:
    """This micro-batch's contribution to the objective; contributions of all micro-batches and ranks add up to it."""
    loss = output.loss_sum / max(1.0, totals.targets)
    mean_probs_LE = output.router.prob_sums / totals.tokens
    load_LE = load_share(previous_counts)
    if config.balance_coefficient:
        balance_L = grouped_balance(mean_probs_LE, load_LE, config.balance_group_size)
        loss = loss + config.balance_coefficient * balance_L.sum()
    if config.expert_balance_coefficient:
        loss = loss + config.expert_balance_coefficient * grouped_balance(mean_probs_LE, load_LE, 1).sum()
    return loss + config.z_coefficient * output.router.z_sum.sum() / totals.tokens


class StepSums:
    """Adds up what the metrics need over the micro-batches of a step."""

    def __init__(self, num_sources: int) -> None:
        self.num_sources = num_sources
        self.sums: dict[str, Tensor] = {}

    def add(self, output: AriaOutput, source_of_target: Tensor) -> None:
        """source_of_target: int64 [N], the source of each target position."""
        losses = output.token_losses.double()
        per_source = torch.zeros(self.num_sources, dtype=torch.float64, device=losses.device)
        new = {
            "source_loss": per_source.index_add(0, source_of_target, losses),
            "source_targets": per_source.index_add(0, source_of_target, torch.ones_like(losses)),
            "counts": output.router.counts.double(),
            "prob_sums": output.router.prob_sums.detach().double(),
            "z_sum": output.router.z_sum.detach().double(),
            "entropy_sum": output.router.entropy_sum.double(),
        }
        self.sums = {key: self.sums[key] + value if self.sums else value for key, value in new.items()}


def step_metrics(sums: dict[str, Tensor], totals: Totals, config: ModelConfig, sources: list[str]) -> dict[str, float]:
    """Losses and routing figures of a step from its sums over the global batch."""
    counts_LE = sums["counts"]
    load_LE = load_share(counts_LE).double()
    mean_probs_LE = sums["prob_sums"] / totals.tokens
    balance_L = grouped_balance(mean_probs_LE, load_LE, config.balance_group_size)
    load_LG = load_LE.unflatten(-1, (-1, config.balance_group_size)).sum(-1)
    metrics = {
        "loss": sums["source_loss"].sum() / max(1.0, totals.targets),
        "balance_loss": balance_L.mean(),
        "z_loss": sums["z_sum"].mean() / totals.tokens,
        "expert_load_max": (load_LE.amax(-1) * load_LE.shape[-1]).mean(),
        "group_load_max": (load_LG.amax(-1) * load_LG.shape[-1]).mean(),
        "router_entropy": sums["entropy_sum"].mean() / totals.tokens,
    }
    if len(sources) > 1:
        for index, name in enumerate(sources):
            targets = sums["source_targets"][index]
            if targets > 0:
                metrics[f"loss/{name}"] = sums["source_loss"][index] / targets
    return {key: float(value) for key, value in metrics.items()}
