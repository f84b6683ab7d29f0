"""The balance loss and the z-loss against their formulas, and the reductions that keep them right on many ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aria_train.moe.balance import balance_loss, grouped_balance, load_share, z_loss

EXPERTS, TOP_K = 16, 3
GROUP_SIZES = (1, 2, 4, 8, 16)


def routed(num_tokens: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Probabilities [T, E] and counts [E] of random tokens."""
    logits = torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).mul_(scale)
    return logits.softmax(-1), count(logits)


def count(logits: Tensor) -> Tensor:
    counts = torch.zeros(EXPERTS)
    for row in logits:
        for expert in row.topk(TOP_K).indices.tolist():
            counts[expert] += 1
    return counts


def by_formula(probs: Tensor, counts: Tensor, group_size: int) -> float:
    """G * sum_g (sum f) (sum P), in plain floats."""
    num_tokens, groups = len(probs), range(0, EXPERTS, group_size)
    share = [float(c) / float(counts.sum()) for c in counts]
    mean = [sum(float(row[e]) for row in probs) / num_tokens for e in range(EXPERTS)]
    return len(groups) * sum(sum(share[g : g + group_size]) * sum(mean[g : g + group_size]) for g in groups)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_balance_loss_is_its_formula(group_size: int) -> None:
    probs, counts = routed(40, seed=1)
    assert balance_loss(probs, counts, TOP_K, group_size).item() == pytest.approx(by_formula(probs, counts, group_size))


def test_groups_of_one_give_the_switch_loss() -> None:
    probs, counts = routed(40, seed=2)
    switch = EXPERTS * (counts / (TOP_K * 40) * probs.mean(0)).sum()
    torch.testing.assert_close(balance_loss(probs, counts, TOP_K, 1), switch, rtol=1e-6, atol=0)


def test_one_group_of_all_is_always_one() -> None:
    probs, counts = routed(40, seed=3)
    assert balance_loss(probs, counts, TOP_K, EXPERTS).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_uniform_routing_gives_one(group_size: int) -> None:
    probs = torch.full((8, EXPERTS), 1 / EXPERTS)
    assert balance_loss(probs, torch.full((EXPERTS,), 5.0), TOP_K, group_size).item() == pytest.approx(1.0)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_all_to_one_group_gives_the_number_of_groups(group_size: int) -> None:
    inside = torch.zeros(EXPERTS)
    inside[:group_size] = 1 / group_size
    loss = balance_loss(inside.expand(10, -1), inside * 30, TOP_K, group_size)
    assert loss.item() == pytest.approx(EXPERTS / group_size)


def test_one_expert_of_each_group_taking_all_is_seen_by_the_expert_level_alone() -> None:
    """Groups of 8 rate it as balanced; groups of one rate it 8 times worse than balanced."""
    first_of_group = torch.zeros(EXPERTS)
    first_of_group[::8] = 0.5
    probs, counts = first_of_group.expand(12, -1), first_of_group * 12
    assert balance_loss(probs, counts, 1, 8).item() == pytest.approx(1.0)
    assert balance_loss(probs, counts, 1, 1).item() == pytest.approx(8.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from(GROUP_SIZES), factor=st.integers(1, 1000))
def test_only_shares_of_the_counts_matter(seed: int, group_size: int, factor: int) -> None:
    """Counts over a larger batch with the same shares give the same loss."""
    probs, counts = routed(6, seed)
    once = balance_loss(probs, counts, TOP_K, group_size)
    torch.testing.assert_close(balance_loss(probs, counts * factor, TOP_K, group_size), once, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from(GROUP_SIZES))
def test_experts_of_a_group_are_interchangeable(seed: int, group_size: int) -> None:
    """Only sums over groups count, and every expert of a group gets the same gradient."""
    probs, counts = routed(6, seed)
    probs = probs.clone().requires_grad_()
    loss = balance_loss(probs, counts, TOP_K, group_size)
    (gradient,) = torch.autograd.grad(loss, probs)
    grouped = gradient.view(6, -1, group_size)
    assert torch.equal(grouped, grouped[:, :, :1].expand_as(grouped))
    shuffled = torch.arange(EXPERTS).view(-1, group_size).flip(1).flatten()
    again = balance_loss(probs[:, shuffled], counts[shuffled], TOP_K, group_size)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)


def test_the_load_carries_no_gradient() -> None:
    probs, counts = routed(6, seed=4)
    counts.requires_grad_()
    probs = probs.clone().requires_grad_()
    balance_loss(probs, counts, TOP_K, 4).backward()
    assert counts.grad is None
    load = (counts.detach() / counts.sum()).detach().requires_grad_()
    grouped_balance(probs.mean(0), load, 4).backward()
    assert load.grad is None


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_with_global_counts_the_parts_average_to_the_whole(group_size: int) -> None:
    """Parts of unequal size, weighted by their tokens; their own counts would overstate the loss."""
    logits = torch.randn(60, EXPERTS, generator=torch.Generator().manual_seed(5)) * 2
    # Each part likes other experts, as tokens of one document do.
    parts = [part + 2 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(n)) for n, part in
             enumerate(logits.split([10, 20, 30]))]  # fmt: skip
    counts = [count(part) for part in parts]
    whole = balance_loss(torch.cat(parts).softmax(-1), sum(counts, torch.zeros(EXPERTS)), TOP_K, group_size)
    shares = [len(part) / 60 for part in parts]
    with_global = [
        balance_loss(part.softmax(-1), sum(counts, torch.zeros(EXPERTS)), TOP_K, group_size) for part in parts
    ]
    with_local = [
        balance_loss(part.softmax(-1), own, TOP_K, group_size) for part, own in zip(parts, counts, strict=True)
    ]
    average = sum(share * loss.item() for share, loss in zip(shares, with_global, strict=True))
    assert average == pytest.approx(whole.item(), rel=1e-5)
    if group_size < EXPERTS:
        assert sum(share * loss.item() for share, loss in zip(shares, with_local, strict=True)) > 1.05 * whole.item()


def test_group_sizes_that_do_not_divide_are_refused() -> None:
    probs, counts = routed(6, seed=6)
    with pytest.raises(ValueError, match="16 experts cannot be split into groups of 3"):
        balance_loss(probs, counts, TOP_K, 3)


def test_low_precision_is_summed_in_float32() -> None:
    probs, counts = routed(4096, seed=7)
    loss = balance_loss(probs.bfloat16(), counts, TOP_K, 4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(balance_loss(probs.bfloat16().double(), counts, TOP_K, 4).item(), rel=1e-5)


def test_load_share_is_uniform_until_something_was_counted() -> None:
    counts = torch.tensor([[0.0, 0.0, 0.0, 0.0], [6.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(load_share(counts), torch.tensor([[0.25] * 4, [0.75, 0.25, 0.0, 0.0]]))


def test_load_share_is_exact_for_counts_beyond_float32() -> None:
    counts = torch.tensor([2.0**40 + 1, 2.0**40 - 1], dtype=torch.float64)
    assert load_share(counts).tolist() == [0.5, 0.5]


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.randn(30, EXPERTS, generator=torch.Generator().manual_seed(8)).mul_(3).requires_grad_()
    plain = torch.stack([row.double().exp().sum().log() ** 2 for row in logits]).mean()
    loss = z_loss(logits)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(gradient, expected)


def test_z_loss_of_large_logits_is_finite_and_of_low_precision_is_float32() -> None:
    logits = torch.full((2, EXPERTS), 1000.0)
    assert z_loss(logits).item() == pytest.approx((1000 + torch.tensor(16.0).log().item()) ** 2)
    assert z_loss(logits.bfloat16()).dtype == torch.float32
