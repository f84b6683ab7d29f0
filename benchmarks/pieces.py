"""Parts of a step alone: grouped experts against one dense product, dispatch and combine, output head with its loss."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from aria_train.model.loss import linear_cross_entropy
from aria_train.moe.dispatch import LocalDispatcher
from aria_train.moe.experts import GroupedExperts
from benchmarks.measure import DTYPES, compare
from benchmarks.table import Row

TOKENS, EXPERTS, TOP_K = 8192, 64, 6
EXPERT_SIZES = [(256, 128), (512, 256), (2560, 1664)]
"""Widths of the model and of an expert, Aria's own last."""


def rows(turns: int, ceilings: dict[str, float]) -> list[Row]:
    found = []
    for precision, (width, expert_size) in itertools.product(ceilings, EXPERT_SIZES):
        enough = 3 if width > 1024 else turns  # a turn takes up to a minute
        found.append(grouped(precision, width, expert_size, min(turns, enough), ceilings[precision]))
        print(f"  {found[-1].what}, {found[-1].shape}: {found[-1].comparison.ratio:.2f}x", flush=True)
    for precision in ceilings:
        found += [dispatch(precision, turns), head(precision, turns, ceilings[precision])]
        for row in found[-2:]:
            print(f"  {row.what}, {row.shape}: {row.comparison.ratio:.2f}x", flush=True)
    return found


def grouped(precision: str, width: int, expert_size: int, turns: int, ceiling: float) -> Row:
    """SwiGLU experts, forward and backward, unevenly filled, against dense products of the same size in all."""
    dtype = DTYPES[precision]
    experts = GroupedExperts(EXPERTS, width, expert_size).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rows_SH = torch.randn(TOKENS * TOP_K, width, dtype=dtype)
    shares = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(0)) + 0.5
    offsets = (shares.cumsum(0) / shares.sum() * len(rows_SH)).round().int()
    gate_up, down = (
        torch.randn(*shape, dtype=dtype) * 0.05 for shape in ((width, 2 * expert_size), (expert_size, width))
    )
    gate_up.requires_grad_()
    down.requires_grad_()

    def ours() -> None:
        experts(rows_SH.detach().requires_grad_(), offsets).backward(rows_SH)

    def dense() -> None:
        gate, up = (rows_SH.detach().requires_grad_() @ gate_up).chunk(2, dim=-1)
        ((F.silu(gate) * up) @ down).backward(rows_SH)

    comparison = compare(ours, dense, turns)
    share = 18.0 * len(rows_SH) * width * expert_size / comparison.seconds[0] / ceiling
    shape = f"{precision}, {len(rows_SH):,} rows, {EXPERTS} experts of {expert_size}, width {width}"
    return Row("grouped experts", "one dense SwiGLU of as many FLOPs", comparison, shape, share)


def dispatch(precision: str, turns: int, width: int = 512) -> Row:
    """Sorting rows by expert, bringing them home and summing them, forward and backward, against copying as much."""
    dtype = DTYPES[precision]
    x_TH = torch.randn(TOKENS, width, dtype=dtype)
    experts_TK = torch.rand(TOKENS, EXPERTS).topk(TOP_K, dim=-1).indices
    counts_E = torch.bincount(experts_TK.flatten(), minlength=EXPERTS)
    weights_TK = torch.rand(TOKENS, TOP_K).softmax(-1)
    dispatcher = LocalDispatcher()
    source, target = torch.randn(TOKENS * TOP_K, width, dtype=dtype), torch.empty(TOKENS * TOP_K, width, dtype=dtype)

    def ours() -> None:
        dispatched = dispatcher.dispatch(x_TH.detach().requires_grad_(), experts_TK, counts_E)
        rows_SH = dispatcher.receive(dispatched)
        dispatcher.combine(rows_SH, dispatched, weights_TK.detach().requires_grad_()).backward(x_TH)

    def copies() -> None:
        for _ in range(4):  # out, home, and both ways back
            target.copy_(source)

    shape = f"{precision}, {TOKENS} tokens, top {TOP_K}, width {width}"
    return Row("dispatch and combine", "four copies of the rows", compare(ours, copies, turns), shape)


def head(precision: str, turns: int, ceiling: float, width: int = 256, vocabulary: int = 32768) -> Row:
    """Output head and loss, forward and backward, in chunks, against whole logits and PyTorch's cross-entropy."""
    dtype, tokens = DTYPES[precision], TOKENS // 2
    x, weight = torch.randn(tokens, width, dtype=dtype), (torch.randn(vocabulary, width) * 0.05).to(dtype)
    labels = torch.randint(vocabulary, (tokens,))

    def ours() -> None:
        linear_cross_entropy(x.detach().requires_grad_(), weight.detach().requires_grad_(), labels)[0].backward()

    def whole() -> None:
        logits = F.linear(x.detach().requires_grad_(), weight.detach().requires_grad_())
        F.cross_entropy(logits.float(), labels, reduction="sum").backward()

    comparison = compare(ours, whole, turns)
    share = 6.0 * tokens * width * vocabulary / comparison.seconds[0] / ceiling
    shape = f"{precision}, {tokens} tokens, width {width}, vocabulary {vocabulary // 1024}K"
    return Row("head and loss, chunked", "whole logits", comparison, shape, share)
