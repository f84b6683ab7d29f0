"""The mixture-of-experts layer.

1. The router picks K experts per token, and weights that sum to 1.
2. Dispatch lays the chosen pairs out by expert, on the ranks that hold them; the shared expert runs on every token
   while they move.
3. The experts run as grouped GEMMs.
4. Combine brings the outputs home and sums them by weight.

In training on a CPU that holds all experts, steps 2 to 4 are one operation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aria_train import kernels
from aria_train.config import ModelConfig
from aria_train.kernels import routing
from aria_train.moe.dispatch import Dispatcher, LocalDispatcher
from aria_train.moe.experts import GroupedExperts, SharedExpert
from aria_train.moe.router import Router, RouterStats


class MoELayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config.hidden_size, config.num_experts, config.top_k)
        self.experts = GroupedExperts(config.num_experts, config.hidden_size, config.expert_size)
        self.shared: SharedExpert | None = None
        if config.num_shared_experts:
            self.shared = SharedExpert(config.hidden_size, config.num_shared_experts * config.expert_size)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_TH: Tensor) -> tuple[Tensor, RouterStats]:
        """[T, H] -> [T, H], and this layer's routing statistics."""
        weights_TK, experts_TK, stats = self.router(x_TH)
        if self._mixes(x_TH):
            out_TH = self._mixture(x_TH, weights_TK, experts_TK, stats)
            return (out_TH if self.shared is None else out_TH + self.shared(x_TH)), stats
        dispatched = self.dispatcher.dispatch(x_TH, experts_TK, stats.counts)
        shared_TH = self.shared(x_TH) if self.shared is not None else None
        rows_SH = self.experts(self.dispatcher.receive(dispatched), dispatched.offsets)
        out_TH = self.dispatcher.combine(rows_SH, dispatched, weights_TK)
        return (out_TH if shared_TH is None else out_TH + shared_TH), stats

    def _mixes(self, x_TH: Tensor) -> bool:
        """Whether steps 2 to 4 are one operation: it is what needs least memory where a backward pass follows."""
        here = isinstance(self.dispatcher, LocalDispatcher) and self.experts.mixes
        return here and kernels.on_cpu(x_TH) and torch.is_grad_enabled()

    def _mixture(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, stats: RouterStats) -> Tensor:
        order_R = routing.stable_argsort(experts_TK.flatten(), stats.counts.shape[0])
        pairs = order_R // experts_TK.shape[1], weights_TK.flatten().index_select(0, order_R)
        out_TH: Tensor = self.experts(x_TH, stats.counts.cumsum(0).to(torch.int32), pairs)
        return out_TH
