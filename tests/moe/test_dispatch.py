"""Dispatch, experts and combine against a loop over tokens, on one rank and with experts spread over several."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, sort_arrivals, sort_by_expert
from aria_train.moe.experts import GroupedExperts
from aria_train.parallel.exchange import Exchange
from tests.distributed import run_distributed

HIDDEN, WIDTH, EXPERTS, TOP_K = 8, 4, 8, 2

SCENARIOS: dict[str, Any] = {
    # Tokens on each of up to four ranks, and the experts that tokens choose among.
    "all experts": ([5, 9, 3, 7], range(8)),
    "some experts empty": ([5, 9, 3, 7], (1, 2, 6)),
    "a rank without work": ([5, 9, 3, 7], (0, 1)),
    "only the last rank has work": ([5, 9, 3, 7], (6, 7)),
    "a rank without tokens": ([5, 0, 3, 7], range(8)),
    "tokens on the last rank alone": ([0, 0, 0, 4], range(8)),
    "no tokens at all": ([0, 0, 0, 0], range(8)),
    "one token": ([1, 0, 0, 0], range(8)),
}


@dataclass
class Case:
    """All ranks' tokens and choices, and all experts, as float32 leaves."""

    tokens: list[Tensor]
    weights: list[Tensor]
    experts: list[Tensor]
    gate_up: Tensor
    down: Tensor
    directions: list[Tensor]
    """What every output is multiplied with to make a scalar."""


def case(name: str, num_ranks: int) -> Case:
    sizes, pool = SCENARIOS[name]
    generator = torch.Generator().manual_seed(hash(tuple(sizes)) % 1000)
    pairs = list(itertools.permutations(pool, TOP_K))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    sizes = sizes[-num_ranks:] if sum(sizes[:num_ranks]) == 0 else sizes[:num_ranks]
    picks = [[int(torch.randint(len(pairs), (), generator=generator)) for _ in range(size)] for size in sizes]
    return Case(
        [random(size, HIDDEN).requires_grad_() for size in sizes],
        [random(size, TOP_K).softmax(-1).requires_grad_() for size in sizes],
        [torch.tensor([pairs[p] for p in rank], dtype=torch.int64).view(-1, TOP_K) for rank in picks],
        # Scaled as in a model. Terms of some 50 that cancel would leave rounding alone, which differs by processor.
        random(EXPERTS, HIDDEN, 2 * WIDTH, scale=HIDDEN**-0.5).requires_grad_(),
        random(EXPERTS, WIDTH, HIDDEN, scale=WIDTH**-0.5).requires_grad_(),
        [random(size, HIDDEN) for size in sizes],
    )


def naive(data: Case) -> list[Tensor]:
    """Outputs of every rank's tokens; one token and one expert at a time."""
    outputs = []
    for tokens, weights, experts in zip(data.tokens, data.weights, data.experts, strict=True):
        rows = [tokens[:0]]
        for token, shares, chosen in zip(tokens, weights, experts.tolist(), strict=True):
            row = torch.zeros(HIDDEN)
            for share, expert in zip(shares, chosen, strict=True):
                gate, up = (token @ data.gate_up[expert]).chunk(2)
                row = row + share * ((gate * gate.sigmoid() * up) @ data.down[expert])
            rows.append(row[None])
        outputs.append(torch.cat(rows))
    return outputs


def scalar(outputs: list[Tensor], data: Case) -> Tensor:
    return torch.stack([(out * way).sum() for out, way in zip(outputs, data.directions, strict=True)]).sum()


def grouped(dispatcher: Dispatcher, data: Case, rank: int, gate_up: Tensor, down: Tensor) -> Tensor:
    """This rank's outputs through the package."""
    module = GroupedExperts(gate_up.shape[0], HIDDEN, WIDTH)
    module.gate_up, module.down = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    # The module's own leaves, so that the caller finds the gradients in the tensors it gave.
    object.__setattr__(module, "_parameters", {"gate_up": gate_up, "down": down})
    counts = torch.bincount(data.experts[rank].flatten(), minlength=EXPERTS).float()
    sent = dispatcher.dispatch(data.tokens[rank], data.experts[rank], counts)
    return dispatcher.combine(module(dispatcher.receive(sent), sent.offsets), sent, data.weights[rank])


def spread(names: list[str]) -> list[dict[str, Tensor]]:
    """Every scenario with the experts spread over all ranks: this rank's outputs and gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = EXPERTS // ranks
    assert dist.group.WORLD is not None
    dispatcher = AllToAllDispatcher(Exchange(dist.group.WORLD))
    results = []
    for name in names:
        data = case(name, ranks)
        own = slice(rank * share, (rank + 1) * share)
        gate_up, down = (x.detach()[own].clone().requires_grad_() for x in (data.gate_up, data.down))
        out = grouped(dispatcher, data, rank, gate_up, down)
        (out * data.directions[rank]).sum().backward()
        results.append(
            {
                "out": out.detach(),
                "tokens": _gradient(data.tokens[rank]),
                "weights": _gradient(data.weights[rank]),
                "gate_up": _gradient(gate_up),
                "down": _gradient(down),
            }
        )
    return results


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("name", SCENARIOS)
def test_local_experts_equal_a_loop(name: str) -> None:
    plain, fast = case(name, 1), case(name, 1)
    wanted = naive(plain)
    scalar(wanted, plain).backward()
    found = grouped(LocalDispatcher(), fast, 0, fast.gate_up, fast.down)
    scalar([found], fast).backward()
    torch.testing.assert_close(found, wanted[0])
    pairs = [(fast.tokens[0], plain.tokens[0]), (fast.weights[0], plain.weights[0])]
    for mine, theirs in [*pairs, (fast.gate_up, plain.gate_up), (fast.down, plain.down)]:
        torch.testing.assert_close(_gradient(mine), _gradient(theirs))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_spread_experts_equal_a_loop(ranks: int) -> None:
    """An expert's gradient is the sum over the tokens of all ranks, no more and no less."""
    names = list(SCENARIOS)
    per_rank = run_distributed(spread, ranks, names)
    for index, name in enumerate(names):
        data = case(name, ranks)
        wanted = naive(data)
        scalar(wanted, data).backward()
        found = [results[index] for results in per_rank]
        for rank in range(ranks):
            torch.testing.assert_close(found[rank]["out"], wanted[rank].detach(), msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(found[rank]["tokens"], _gradient(data.tokens[rank]))
            torch.testing.assert_close(found[rank]["weights"], _gradient(data.weights[rank]))
        torch.testing.assert_close(torch.cat([f["gate_up"] for f in found]), _gradient(data.gate_up))
        torch.testing.assert_close(torch.cat([f["down"] for f in found]), _gradient(data.down))


def test_the_same_input_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        data = case("all experts", 1)
        out = grouped(LocalDispatcher(), data, 0, data.gate_up, data.down)
        scalar([out], data).backward()
        results.append([out.detach(), *(_gradient(x) for x in (data.tokens[0], data.weights[0], data.gate_up))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_are_sorted_by_expert_and_tokens_keep_their_order() -> None:
    experts = torch.tensor([[3, 1], [1, 0], [3, 0]])
    order, home = sort_by_expert(experts, 4)
    # Pair number 2 * token + choice.
    assert order.tolist() == [3, 5, 1, 2, 0, 4]
    assert order[home].tolist() == list(range(6))


def test_arrivals_are_sorted_by_expert_and_then_by_rank() -> None:
    # Rank 0 sends two rows for our first expert and one for the second, rank 1 none and two.
    assert sort_arrivals(torch.tensor([[2, 1], [0, 2]]), 5).tolist() == [0, 1, 2, 3, 4]
    assert sort_arrivals(torch.tensor([[1, 2], [2, 1]]), 6).tolist() == [0, 3, 4, 1, 2, 5]
