"""The router: choice, weights and statistics against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aria_train.moe.router import Router

HIDDEN, EXPERTS, TOP_K = 12, 8, 3


@pytest.fixture
def router() -> Router:
    module = Router(HIDDEN, EXPERTS, TOP_K)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_the_largest_logits_are_chosen_and_weighted_by_their_softmax(router: Router) -> None:
    x = tokens(20)
    weights, experts, _ = router(x)
    for row, chosen, given in zip(x, experts.tolist(), weights.tolist(), strict=True):
        logits = [float(row @ expert) for expert in router.weight.detach()]
        best = sorted(range(EXPERTS), key=lambda e: -logits[e])[:TOP_K]
        assert chosen == best
        total = sum(math.exp(logits[e]) for e in best)
        assert given == pytest.approx([math.exp(logits[e]) / total for e in best], rel=1e-5)


def test_weights_sum_to_one_and_are_float32(router: Router) -> None:
    for x in (tokens(20), tokens(20).bfloat16()):
        weights, experts, _ = router(x)
        assert weights.dtype == torch.float32
        assert experts.dtype == torch.int64
        torch.testing.assert_close(weights.sum(-1), torch.ones(20))


def test_low_precision_inputs_are_scored_in_float32(router: Router) -> None:
    """bf16 logits would round to ties: here two experts differ by far less than bf16 can tell."""
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3, 0], router.weight[5, 0] = 1.0, 1.0 + 2**-7
        router.weight[3, 1], router.weight[5, 1] = 1.0, 1.0
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 1.0, 64.0
    _, experts, stats = router.to(torch.bfloat16)(x)
    assert experts[0, 0] == 5
    assert stats.z_sum.dtype == stats.prob_sums.dtype == torch.float32


def test_statistics_are_sums_over_tokens(router: Router) -> None:
    x = tokens(15)
    _, experts, stats = router(x)
    probabilities = (x @ router.weight.T).double().softmax(-1)
    assert stats.counts.tolist() == [float((experts == e).sum()) for e in range(EXPERTS)]
    assert stats.counts.sum() == 15 * TOP_K
    torch.testing.assert_close(stats.prob_sums.double(), probabilities.sum(0), rtol=1e-5, atol=1e-6)
    log_partitions = [(row @ router.weight.detach().T).double().exp().sum().log() for row in x]
    assert stats.z_sum.item() == pytest.approx(sum(float(z) ** 2 for z in log_partitions), rel=1e-5)
    entropy = -(probabilities * probabilities.log()).sum()
    assert stats.entropy_sum.item() == pytest.approx(entropy.item(), rel=1e-5)


def test_statistics_of_parts_add_up(router: Router) -> None:
    x = tokens(15)
    whole, parts = router(x)[2], [router(part)[2] for part in x.split([4, 0, 11])]
    for name in ("counts", "prob_sums", "z_sum", "entropy_sum"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_what_carries_a_gradient(router: Router) -> None:
    weights, _, stats = router(tokens(5))
    assert weights.requires_grad
    assert stats.prob_sums.requires_grad
    assert stats.z_sum.requires_grad
    assert not stats.counts.requires_grad
    assert not stats.entropy_sum.requires_grad


def test_entropy_is_largest_for_a_uniform_router(router: Router) -> None:
    with torch.no_grad():
        router.weight.zero_()
    assert router(tokens(4))[2].entropy_sum.item() == pytest.approx(4 * math.log(EXPERTS))
    with torch.no_grad():
        router.weight[0] = 1000.0
    assert router(torch.ones(4, HIDDEN))[2].entropy_sum.item() == pytest.approx(0.0, abs=1e-3)
