"""The router: which experts a token goes to, and with what weight.

Top-k on the raw fp32 logits, then softmax over the selected k, so the weights of a token sum to 1 (aria's released
code; Mixtral does the same). Shape legend: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train.kernels.compiled import chain


class RouterStats(NamedTuple):
    """What the losses and the metrics need of one layer's routing; sums over tokens, so parts add up.

    A tuple, as are all outputs of modules: in dataclasses FSDP2 finds no gradients before PyTorch 2.12.
    """

    counts: Tensor
    """float32 [E]: assignments to each expert. No gradient."""
    prob_sums: Tensor
    """float32 [E]: sum over tokens of the softmax over all experts."""
    z_sum: Tensor
    """float32 []: sum over tokens of the squared log-partition."""
    entropy_sum: Tensor
    """float32 []: sum over tokens of the entropy of the softmax over all experts, in nats. No gradient."""


class Router(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """Returns weights [T, K] fp32, experts [T, K] int64, and statistics."""
        logits_TE = F.linear(x_TH.float(), self.weight.float())
        top_logits_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        weights_TK = top_logits_TK.softmax(-1)
        return weights_TK, experts_TK, RouterStats(*_statistics(logits_TE, experts_TK))


@chain
def _statistics(logits_TE: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_partition_T = logits_TE.logsumexp(-1)
    probs_TE = (logits_TE - log_partition_T[:, None]).exp()
    with torch.no_grad():
        # torch.bincount would have the host wait for a GPU; float32 counts exactly up to 2^24.
        experts_R = experts_TK.flatten()
        counts_E = torch.zeros(logits_TE.shape[1], device=logits_TE.device)
        counts_E.index_add_(0, experts_R, torch.ones(experts_R.shape, device=logits_TE.device))
        entropy_T = log_partition_T - (probs_TE * logits_TE).sum(-1)
    return counts_E, probs_TE.sum(0), log_partition_T.square().sum(), entropy_T.sum()
