"""Experts on a CPU: a few of them at a time, so that what lies between their products stays small and in cache.

Tokens are gathered as they are needed, in the forward pass and again in the backward pass, and outputs are added up
where they belong: no tensor holds every token once per expert. Only what `gate` and `up` made is kept.

Shape legend: T tokens, S (token, expert) pairs sorted by expert, H hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 1 << 20
"""Elements of the widest tensor of the experts that are worked on together."""

_silu_into = torch.ops.aten.silu.out
_silu_backward_into = torch.ops.aten.silu_backward.grad_input


def grouped_swiglu(rows_SH: Tensor, gate_up_EHF: Tensor, down_EFH: Tensor, ends_E: Tensor) -> Tensor:
    """Experts over rows sorted by expert: `(silu(x @ gate) * (x @ up)) @ down` -> [S, H].

    gate_up [E, H, 2F], its first half the gate; down [E, F, H]; ends int32 [E], the end of each expert's rows.
    """
    tokens_S = torch.arange(rows_SH.shape[0])
    return mixture(rows_SH, tokens_S, torch.ones(rows_SH.shape[0]), gate_up_EHF, down_EFH, ends_E)


def mixture(
    x_TH: Tensor, tokens_S: Tensor, weights_S: Tensor, gate_up_EHF: Tensor, down_EFH: Tensor, ends_E: Tensor
) -> Tensor:
    """For every token the weighted sum of its experts -> [T, H].

    tokens int64 [S]: the token of each pair; weights float32 [S]; the rest as in `grouped_swiglu`.
    """
    keep = torch.is_grad_enabled()
    out: Tensor = _mixture(x_TH, tokens_S, weights_S, gate_up_EHF, down_EFH, ends_E, keep)[0]
    return out


@torch.library.custom_op("aria_train::experts", mutates_args=())
def _mixture(
    x: Tensor, tokens_S: Tensor, weights_S: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """The sum, and what gate and up made (nothing unless `keep`). One operator, whose outputs selective recomputation
    can keep: it could not make sense of products that write into buffers."""
    plan = Plan.of(tokens_S, weights_S, ends_E, x.dtype, max(gate_up.shape[1:]))
    out_TH = torch.zeros(x.shape, dtype=plan.weights.dtype)
    hidden = x.new_empty(len(plan.tokens) if keep else plan.largest, gate_up.shape[2])
    rows_buffer, product_buffer = x.new_empty(plan.largest, x.shape[1]), x.new_empty(plan.largest, down.shape[1])
    for part, experts, sizes in plan.groups():
        count = part.stop - part.start
        rows, product = rows_buffer[:count], product_buffer[:count]
        both = hidden[part] if keep else hidden[:count]
        gate, up = both.chunk(2, dim=-1)
        torch.index_select(x, 0, plan.tokens[part], out=rows)
        for a, b, c in zip(rows.split(sizes), gate_up[experts], both.split(sizes), strict=True):
            torch.mm(a, b, out=c)
        _silu_into(gate, out=product).mul_(up).mul_(plan.scales(part, x.dtype))
        for a, b, c in zip(product.split(sizes), down[experts], rows.split(sizes), strict=True):
            torch.mm(a, b, out=c)
        out_TH.index_add_(0, plan.tokens[part], rows.to(out_TH.dtype))
    return out_TH.to(x.dtype, copy=False), hidden if keep else x.new_empty(0)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, tokens_S, weights_S, gate_up, down, ends_E, hidden = ctx.saved_tensors
    need_x, _, need_weights, need_gate_up, need_down, *_ = ctx.needs_input_grad
    plan = Plan.of(tokens_S, weights_S, ends_E, x.dtype, max(gate_up.shape[1:]))
    grad_x = torch.zeros(x.shape, dtype=plan.weights.dtype) if need_x else None
    grad_weights = plan.weights.new_empty(len(plan.tokens)) if need_weights else None
    grad_gate_up = torch.empty_like(gate_up) if need_gate_up else None
    grad_down = torch.empty_like(down) if need_down else None
    width = down.shape[1]
    buffers = [x.new_empty(plan.largest, columns) for columns in (x.shape[1], x.shape[1], 2 * width, width, width)]
    grad = grad.contiguous()
    for part, experts, sizes in plan.groups():
        tokens, scales = plan.tokens[part], plan.scales(part, x.dtype)
        grads, rows, grad_both, grad_product, product = (buffer[: len(tokens)] for buffer in buffers)
        torch.index_select(grad, 0, tokens, out=grads)
        for a, b, c in zip(grads.split(sizes), down[experts], grad_product.split(sizes), strict=True):
            torch.mm(a, b.t(), out=c)
        (gate, up), (grad_gate, grad_up) = hidden[part].chunk(2, dim=-1), grad_both.chunk(2, dim=-1)
        _silu_into(gate, out=product)
        if grad_weights is not None:
            grad_weights[part] = (grad_product * product).mul_(up).sum(-1, dtype=grad_weights.dtype)
        grad_product.mul_(scales)
        torch.mul(grad_product, product, out=grad_up)
        product.mul_(up).mul_(scales)
        _silu_backward_into(grad_product.mul_(up), gate, grad_input=grad_gate)
        torch.index_select(x, 0, tokens, out=rows)
        if grad_down is not None:
            for a, b, c in zip(product.split(sizes), grads.split(sizes), grad_down[experts], strict=True):
                torch.mm(a.t(), b, out=c)
        if grad_gate_up is not None:
            for a, b, c in zip(rows.split(sizes), grad_both.split(sizes), grad_gate_up[experts], strict=True):
                torch.mm(a.t(), b, out=c)
        if grad_x is not None:
            for a, b, c in zip(grad_both.split(sizes), gate_up[experts], rows.split(sizes), strict=True):
                torch.mm(a, b.t(), out=c)
            grad_x.index_add_(0, tokens, rows.to(grad_x.dtype))
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None,
        None if grad_weights is None else plan.of_pairs(grad_weights).to(weights_S.dtype),
        grad_gate_up,
        grad_down,
        None,
        None,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])


_mixture.register_autograd(_backward, setup_context=_keep)


@dataclass
class Plan:
    """Which rows are worked on together."""

    tokens: Tensor
    """int64 [rows]: the token of every row."""
    weights: Tensor
    """float32 (or wider) [rows]; 0 in rows that fill up."""
    places: Tensor | None
    """int64 [S]: the row of each pair, where rows were added."""
    sizes: list[int]
    """Rows of each expert."""
    at_once: int

    @classmethod
    def of(cls, tokens_S: Tensor, weights_S: Tensor, ends_E: Tensor, dtype: torch.dtype, width: int) -> Plan:
        precise = torch.promote_types(dtype, torch.float32)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        at_once = max(1, _AT_ONCE // width)
        if dtype == precise:
            return cls(tokens_S, weights_S.to(precise), None, counts_E.tolist(), at_once)
        # Below float32 oneDNN prepares a kernel for every number of rows it has not seen lately, which takes longer
        # than the product itself. So every expert gets a multiple of 32 rows, and there are few such numbers.
        sizes_E = (counts_E + 31) // 32 * 32
        shifts_E = (sizes_E.cumsum(0) - sizes_E) - (ends_E - counts_E)
        places = torch.arange(len(tokens_S)) + shifts_E.repeat_interleave(counts_E, output_size=len(tokens_S))
        sizes = sizes_E.tolist()
        tokens = tokens_S.new_zeros(sum(sizes)).index_copy_(0, places, tokens_S)
        weights = torch.zeros(sum(sizes), dtype=precise).index_copy_(0, places, weights_S.to(precise))
        return cls(tokens, weights, places, sizes, at_once)

    def groups(self) -> Iterator[tuple[slice, slice, list[int]]]:
        """Rows, experts, and the rows of each of these experts."""
        for first, last in self._bounds():
            start = sum(self.sizes[:first])
            sizes = self.sizes[first:last]
            yield slice(start, start + sum(sizes)), slice(first, last), sizes

    @property
    def largest(self) -> int:
        """Rows of the largest group."""
        return max(sum(self.sizes[first:last]) for first, last in self._bounds())

    def scales(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Weights of some rows, to multiply with: [rows, 1]."""
        return self.weights[part].to(dtype).unsqueeze(1)

    def of_pairs(self, rows: Tensor) -> Tensor:
        """What stands in the rows of pairs."""
        return rows if self.places is None else rows.index_select(0, self.places)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) expert of each group."""
        first, rows = 0, 0
        for expert, size in enumerate(self.sizes):
            if rows and rows + size > self.at_once:
                yield first, expert
                first, rows = expert, 0
            rows += size
        yield first, len(self.sizes)
