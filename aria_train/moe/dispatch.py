"""Moves tokens to their experts and back, dropless.

`dispatch` lays the chosen (token, expert) pairs out as rows sorted by expert, `receive` gives them to the local
experts, `combine` brings the experts' outputs home and sums them with the router's weights. With expert parallelism the
sorted rows move by one all-to-all each way; what is computed between `dispatch` and `receive` hides the first, forward
and backward. Every permutation is a bijection whose inverse is known, so forward and backward are gathers: no
scatter-add, and therefore the same result every time.

Shape legend: T tokens, H hidden, E experts, K experts per token, R = T * K rows here, S rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from aria_train import kernels
from aria_train.kernels import routing
from aria_train.parallel.exchange import Exchange, to_host


@dataclass
class Dispatched:
    """Rows for the local experts, perhaps on their way, and the way back."""

    rows: Tensor
    """[R, H], sorted by expert, or what stands for them while they move."""
    offsets: Tensor
    """int32 [local experts]: end row of each local expert's rows."""
    order: Tensor
    """int64 [R]: which (token, choice) pair each of the rows sent is."""
    home: Tensor
    """int64 [R], its inverse: where each (token, choice) pair stands among the rows sent."""
    journey: Journey | None = None
    """None without expert parallelism."""
    arrival: Tensor | None = None
    """int64 [S]: arrival position of each sorted row; None where rows arrive sorted."""
    arrival_inverse: Tensor | None = None


class Dispatcher(Protocol):
    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, counts_E: Tensor) -> Dispatched: ...

    def receive(self, dispatched: Dispatched) -> Tensor: ...

    def combine(self, rows_SH: Tensor, dispatched: Dispatched, weights_TK: Tensor) -> Tensor: ...


class LocalDispatcher:
    """All experts live here."""

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, counts_E: Tensor) -> Dispatched:
        order_R, home_R = sort_by_expert(experts_TK, counts_E.shape[0])
        rows_RH = _Replicate.apply(x_TH, order_R, home_R, experts_TK.shape[1])
        return Dispatched(rows_RH, counts_E.cumsum(0).to(torch.int32), order_R, home_R)

    def receive(self, dispatched: Dispatched) -> Tensor:
        """[S, H], sorted by local expert."""
        return dispatched.rows

    def combine(self, rows_SH: Tensor, dispatched: Dispatched, weights_TK: Tensor) -> Tensor:
        return routing.weighted_sum(rows_SH, dispatched.home.view_as(weights_TK), dispatched.order, weights_TK)


class AllToAllDispatcher:
    """Experts are spread over the ranks of an exchange, consecutive experts together."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, counts_E: Tensor) -> Dispatched:
        # [ranks, local experts]: what we send to each rank, and what each rank sends us. The one wait for the host.
        ranks = self.exchange.num_ranks
        sending_PE = counts_E.long().view(ranks, -1)
        counting = self.exchange.start(sending_PE, [1] * ranks, [1] * ranks)
        order_R, home_R = sort_by_expert(experts_TK, counts_E.shape[0])
        rows_RH = _Replicate.apply(x_TH, order_R, home_R, experts_TK.shape[1])
        receiving_PE = self.exchange.wait(counting)
        sent, received = to_host(torch.stack([sending_PE.sum(1), receiving_PE.sum(1)])).tolist()

        journey = Journey(self.exchange, sent, received)
        moving_RH = journey.leave(rows_RH)
        arrival_S = sort_arrivals(receiving_PE, sum(received))
        offsets = receiving_PE.sum(0).cumsum(0).to(torch.int32)
        return Dispatched(moving_RH, offsets, order_R, home_R, journey, arrival_S, _inverse(arrival_S))

    def receive(self, dispatched: Dispatched) -> Tensor:
        """[S, H], sorted by local expert."""
        assert dispatched.journey is not None
        rows_SH = dispatched.journey.arrive(dispatched.rows)
        return cast(Tensor, _Permute.apply(rows_SH, dispatched.arrival, dispatched.arrival_inverse))

    def combine(self, rows_SH: Tensor, dispatched: Dispatched, weights_TK: Tensor) -> Tensor:
        assert dispatched.journey is not None
        rows_SH = _Permute.apply(rows_SH, dispatched.arrival_inverse, dispatched.arrival)
        back = Journey(self.exchange, dispatched.journey.received, dispatched.journey.sent)
        rows_RH = back.arrive(back.leave(rows_SH))
        return routing.weighted_sum(rows_RH, dispatched.home.view_as(weights_TK), dispatched.order, weights_TK)


@dataclass
class Journey:
    """One exchange of rows, and of their gradients the other way round: what stands in the code between `leave` and
    `arrive` runs while rows move, and its backward pass while gradients do."""

    exchange: Exchange
    sent: list[int]
    """Rows that go to each rank."""
    received: list[int]
    """Rows that come from each rank."""
    moving: Tensor | None = None

    def leave(self, rows_RH: Tensor) -> Tensor:
        """Sends rows [R, H] off. Returns what stands for them until `arrive`."""
        return cast(Tensor, _Leave.apply(rows_RH, self))

    def arrive(self, standing_RH: Tensor) -> Tensor:
        """Waits for the rows that came instead: [S, H], ordered by the rank that sent them."""
        return cast(Tensor, _Arrive.apply(standing_RH, self))


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, journey: Journey) -> Tensor:
        journey.moving = journey.exchange.start(rows_RH, journey.sent, journey.received)
        ctx.exchange = journey.exchange
        return rows_RH.new_empty(()).expand(rows_RH.shape)  # of the gradient's shape, and no memory

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(grad_RH), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, standing_RH: Tensor, journey: Journey) -> Tensor:
        assert journey.moving is not None
        rows_SH, journey.moving, ctx.journey = journey.exchange.wait(journey.moving), None, journey
        return rows_SH

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None]:
        journey = ctx.journey
        return journey.exchange.start(grad_SH, journey.received, journey.sent), None


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable order of (token, choice) pairs by expert, and its inverse: int64 [R] each."""
    experts_R = experts_TK.flatten()
    order_R = (
        routing.stable_argsort(experts_R, num_experts) if kernels.on_cpu(experts_R) else experts_R.argsort(stable=True)
    )
    return order_R, _inverse(order_R)


def sort_arrivals(receiving_PE: Tensor, num_rows: int) -> Tensor:
    """Rows arrive by (rank, expert); this is the gather index that puts them in order of (expert, rank)."""
    num_ranks, num_local = receiving_PE.shape
    expert_of_run = torch.arange(num_local, device=receiving_PE.device).repeat(num_ranks)
    expert_of_row = expert_of_run.repeat_interleave(receiving_PE.flatten(), output_size=num_rows)
    return expert_of_row.argsort(stable=True)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.shape[0], device=permutation.device)
    return inverse


class _Permute(torch.autograd.Function):
    """rows[index]; the backward gathers with the inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Replicate(torch.autograd.Function):
    """Each token K times, in the order of its experts; the backward gathers a token's K gradients and sums them."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_R: Tensor, home_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(home_R)
        ctx.top_k = top_k
        return x_TH.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None, None]:
        (home_R,) = ctx.saved_tensors
        return routing.sum_rows(grad_RH, home_R.view(-1, ctx.top_k)), None, None, None
