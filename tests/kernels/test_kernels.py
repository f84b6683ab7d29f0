"""The CPU's operations against the plain formulas they stand for: values, and gradients by finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aria_train.kernels
import aria_train.kernels.attention
import aria_train.kernels.batches
from aria_train.kernels import routing
from aria_train.kernels.attention import is_short, short_attention
from aria_train.kernels.batches import Plan
from aria_train.kernels.experts import grouped_swiglu, mixture
from aria_train.kernels.exponentials import exponentials
from aria_train.kernels.feed_forward import gelu_linear, swiglu_linear
from aria_train.kernels.norm import rms_norm
from aria_train.kernels.rope import rotate


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of them short."""
    monkeypatch.setattr(aria_train.kernels, "_BLOCK", 32)
    monkeypatch.setattr(aria_train.kernels.batches, "_AT_ONCE", 1500)
    torch.manual_seed(0)


def gradcheck(function: object, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


def test_rms_norm() -> None:
    x, weight = torch.randn(11, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (6,), weight, 1e-5))
    gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)


def test_rms_norm_of_bfloat16_rounds_once() -> None:
    x, weight = torch.randn(11, 6).bfloat16(), torch.rand(6).bfloat16()
    exact = F.rms_norm(x.double(), (6,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact.bfloat16(), rtol=0, atol=0)


def test_rotation_of_transposed_heads() -> None:
    angles = torch.randn(9, 3, dtype=torch.float64)
    x = torch.randn(2, 9, 6, dtype=torch.float64).transpose(0, 1)
    turned = (
        torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), -1))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], -1))
    gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)


@pytest.mark.parametrize("at_once", [1, 3 * 7 * 7, 1 << 20])
@pytest.mark.parametrize(("keys", "causal"), [(7, True), (7, False), (4, False)])
def test_short_attention(keys: int, causal: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document and head at a time, some with a short rest, and all at once."""
    monkeypatch.setattr(aria_train.kernels.attention, "_AT_ONCE", at_once)
    q = torch.randn(2, 7, 2, 8, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, 2, keys, 2, 8, dtype=torch.float64).transpose(2, 3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(short_attention(q, k, v, causal), expected)
    gradcheck(lambda q, k, v: short_attention(q, k, v, causal), q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_short_attention_in_bf16_is_as_near_as_formulas_in_bf16(causal: bool) -> None:
    leaves, grad = [torch.randn(3, 2, 64, 16) for _ in range(3)], torch.randn(3, 2, 64, 16)

    def gradients(function: object, dtype: torch.dtype) -> list[Tensor]:
        given = [x.bfloat16().to(dtype).requires_grad_() for x in leaves]
        return list(torch.autograd.grad(function(*given), given, grad.bfloat16().to(dtype)))  # type: ignore[operator]

    def formulas(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 4
        hidden = torch.ones(64, 64, dtype=torch.bool).triu(1) if causal else torch.zeros(64, 64, dtype=torch.bool)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    exact = gradients(formulas, torch.float64)
    ours = gradients(lambda q, k, v: short_attention(q, k, v, causal), torch.bfloat16)
    theirs = gradients(formulas, torch.bfloat16)
    for a, b, wanted in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - wanted).norm() <= 1.1 * (b - wanted).norm()


def test_short_attention_is_for_training_below_float32() -> None:
    q, k = torch.zeros(1, 4, 512, 8, dtype=torch.bfloat16), torch.zeros(1, 4, 513, 8, dtype=torch.bfloat16)
    assert is_short(q, q)
    assert not is_short(q, k)
    assert not is_short(q, q[:, :2])
    assert not is_short(q.float(), q.float())
    with torch.no_grad():
        assert not is_short(q, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials_in_place(dtype: torch.dtype) -> None:
    logits = (torch.randn(11, 6) * 50).to(dtype)
    peak = logits.float().amax(-1, keepdim=True)
    exact = (logits.float() - peak).exp()
    found, total = exponentials(logits)
    torch.testing.assert_close(found, peak, rtol=0, atol=0)
    torch.testing.assert_close(total, exact.sum(-1, keepdim=True))
    torch.testing.assert_close(logits, exact.to(dtype), rtol=0, atol=0)


def test_swiglu_of_the_halves_of_one_tensor_and_the_product_after_it() -> None:
    both, weight = torch.randn(13, 8, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu_linear(gate, up, weight), (F.silu(gate) * up) @ weight.T)
    gradcheck(lambda both, weight: swiglu_linear(*both.chunk(2, dim=-1), weight), both, weight)


@pytest.mark.parametrize("rows", [13, 0])
def test_gelu_and_the_product_after_it(rows: int) -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((rows, 8), (3, 8), (3,)))
    torch.testing.assert_close(gelu_linear(x, weight, bias), F.linear(F.gelu(x, approximate="tanh"), weight, bias))
    gradcheck(gelu_linear, x, weight, bias)


def test_a_frozen_product_after_an_activation_gets_no_gradient() -> None:
    x, weight, bias = torch.randn(13, 8).requires_grad_(), torch.randn(3, 8), torch.randn(3)
    (gelu_linear(x, weight, bias) + swiglu_linear(x, x, weight)).sum().backward()
    wanted = x.detach().requires_grad_()
    (F.linear(F.gelu(wanted, approximate="tanh"), weight, bias) + (F.silu(wanted) * wanted) @ weight.T).sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize("filling", [0, 1 << 10, 1 << 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_experts_with_many_rows_one_and_none(
    dtype: torch.dtype, tolerance: float, filling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aria_train.kernels.batches, "_FILLING", filling)
    monkeypatch.setattr(aria_train.kernels.batches, "_AT_ONCE", 6000)
    counts = [37, 0, 1, 64, 0]
    rows, gate_up, down = torch.randn(102, 16), torch.randn(5, 16, 32) / 4, torch.randn(5, 16, 16) / 4
    grad = torch.randn(102, 16)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (rows, gate_up, down)]
        out = function(*leaves)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def plain(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parts = []
        for x, into, out in zip(rows.split(counts), gate_up, down, strict=True):
            gate, up = (x @ into).chunk(2, dim=-1)
            parts.append((F.silu(gate) * up) @ out)
        return torch.cat(parts)

    ends = torch.tensor(counts).cumsum(0).int()
    results = run(lambda *leaves: grouped_swiglu(*leaves, ends), dtype)
    for result, expected in zip(results, run(plain, torch.float64), strict=True):
        assert result.dtype == dtype
        assert (result.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("alike", [1.0, 0.1], ids=["alone", "in pairs"])
def test_mixture_of_experts_with_many_tokens_few_and_none(alike: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 goes to three experts, token 6 to none."""
    monkeypatch.setattr(aria_train.kernels.batches, "_ALIKE", alike)
    experts = [[0, 1, 2, 3, 4, 5], [], [0], [0, 3], []]
    tokens, ends = (
        torch.tensor([token for chosen in experts for token in chosen]),
        torch.tensor([6, 6, 7, 9, 9], dtype=torch.int32),
    )
    x, gate_up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 4), (5, 4, 6), (5, 3, 4)))
    weights = torch.rand(9, dtype=torch.float64)

    def plain(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out, pair = torch.zeros_like(x), 0
        for expert, chosen in enumerate(experts):
            for token in chosen:
                gate, up = (x[token] @ gate_up[expert]).chunk(2)
                share = weights[pair] * ((F.silu(gate) * up) @ down[expert])
                out, pair = out.index_add(0, torch.tensor([token]), share[None]), pair + 1
        return out

    def fast(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return mixture(x, tokens, weights, gate_up, down, ends)

    torch.testing.assert_close(fast(x, weights, gate_up, down), plain(x, weights, gate_up, down))
    gradcheck(fast, x, weights, gate_up, down)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([64, 64, 64, 64], [(4, 64)]),
        ([60, 33, 1, 1], [(2, 64), (2, 32)]),
        ([1, 1, 1, 500], [(2, 32), (1, 32), (1, 512)]),
        ([0, 0, 0, 0], [(4, 0)]),
        ([5, 5, 5], [(3, 32)]),
        ([2000, 2000], [(1, 2016), (1, 2016)]),
    ],
)
def test_experts_of_about_as_many_rows_share_a_product(
    counts: list[int], wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aria_train.kernels.batches, "_AT_ONCE", 1000 * 16)
    monkeypatch.setattr(aria_train.kernels.batches, "_FILLING", 40 * 16)
    plan = Plan.of(None, None, torch.tensor(counts).cumsum(0).int(), torch.bfloat16, 16)
    assert [(batch.number, batch.size) for group in plan.groups for batch in group.batches] == wanted
    assert plan.num_rows == sum(experts * size for experts, size in wanted)
    assert sum(group.pairs.stop - group.pairs.start for group in plan.groups) == sum(counts)
    assert plan.places is not None
    assert len(plan.places.unique()) == sum(counts)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([5, 5], [([0, 1], 5)]),
        ([7, 64, 2, 60, 8], [([1, 3], 64), ([0, 4], 8), ([2], 2)]),
        ([0, 3, 0], [([1], 3), ([0, 2], 0)]),
        ([1, 100, 10], [([1], 100), ([2], 10), ([0], 1)]),
        ([80, 80], [([0], 80), ([1], 80)]),
        ([100, 200, 300], [([0], 100), ([1], 200), ([2], 300)]),
    ],
    ids=["equal", "alike", "empty", "unlike", "too large together", "many rows"],
)
def test_in_float32_the_two_experts_most_alike_share_a_product(
    counts: list[int], wanted: list[tuple[list[int], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aria_train.kernels.batches, "_AT_ONCE", 150 * 16)
    monkeypatch.setattr(aria_train.kernels.batches, "_FEW", 190)
    pairs, ends = torch.arange(sum(counts)), torch.tensor(counts).cumsum(0).int()
    plan = Plan.of(pairs, torch.ones(len(pairs)), ends, torch.float32, 16)
    batches = [batch for group in plan.groups for batch in group.batches]
    assert [([*range(len(counts))[batch.experts]], batch.size) for batch in batches] == wanted
    assert all(batch.number == len(experts) for batch, (experts, _) in zip(batches, wanted, strict=True))
    assert plan.tokens is not None
    own = pairs if plan.places is None else plan.places
    assert plan.tokens[own].equal(pairs)
    rows = [expert for experts, size in wanted for expert in experts for _ in range(size)]
    expert_of_pair = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert torch.tensor(rows)[own].equal(expert_of_pair)


def test_weighted_sum_of_each_tokens_rows() -> None:
    experts = torch.tensor([[2, 0], [1, 2], [2, 1]])
    order = routing.stable_argsort(experts.flatten(), 3)
    assert order.tolist() == [1, 2, 5, 0, 3, 4]
    home = order.argsort().view(3, 2)
    rows, weights = torch.randn(6, 4, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    expected = (rows[home] * weights[..., None]).sum(1)
    torch.testing.assert_close(routing.weighted_sum(rows, home, order, weights), expected)
    gradcheck(lambda rows, weights: routing.weighted_sum(rows, home, order, weights), rows, weights)
