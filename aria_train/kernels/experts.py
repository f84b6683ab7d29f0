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
    out: Tensor = _mixture(rows_SH, None, None, gate_up_EHF, down_EFH, ends_E, torch.is_grad_enabled())[0]
    return out


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
    x: Tensor,
    tokens_S: Tensor | None,
    weights_S: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    ends_E: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The sum (without tokens: the rows themselves, each its expert's), and what gate and up made (nothing unless
    `keep`). One operator, whose outputs selective recomputation can keep: it could not make sense of products that
    write into buffers."""
    plan = Plan.of(tokens_S, weights_S, ends_E, x.dtype, max(gate_up.shape[1:]))
    out_TH = plan.room_for(x)
    hidden = x.new_empty(plan.num_rows if keep else plan.largest, gate_up.shape[2])
    rows_buffer, product_buffer = x.new_empty(plan.largest, x.shape[1]), x.new_empty(plan.largest, down.shape[1])
    for part, experts, sizes in plan.groups():
        count = part.stop - part.start
        rows, product = plan.gather(x, part, rows_buffer[:count]), product_buffer[:count]
        both = hidden[part] if keep else hidden[:count]
        gate, up = both.chunk(2, dim=-1)
        for a, b, c in zip(rows.split(sizes), gate_up[experts], both.split(sizes), strict=True):
            torch.mm(a, b, out=c)
        _silu_into(gate, out=product).mul_(up)
        if plan.weights is not None:
            product.mul_(plan.scales(part, x.dtype))
        out = rows_buffer[:count]
        for a, b, c in zip(product.split(sizes), down[experts], out.split(sizes), strict=True):
            torch.mm(a, b, out=c)
        plan.put(out_TH, out, part)
    return out_TH.to(x.dtype), hidden if keep else x.new_empty(0)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, tokens_S, weights_S, gate_up, down, ends_E, hidden = ctx.saved_tensors
    need_x, _, need_weights, need_gate_up, need_down, *_ = ctx.needs_input_grad
    plan = Plan.of(tokens_S, weights_S, ends_E, x.dtype, max(gate_up.shape[1:]))
    grad_x = plan.room_for(x) if need_x else None
    grad_weights = torch.empty_like(plan.weights) if need_weights and plan.weights is not None else None
    grad_gate_up = torch.empty_like(gate_up) if need_gate_up else None
    grad_down = torch.empty_like(down) if need_down else None
    width = down.shape[1]
    buffers = [x.new_empty(plan.largest, columns) for columns in (x.shape[1], x.shape[1], 2 * width, width, width)]
    grad = grad.contiguous()
    for part, experts, sizes in plan.groups():
        count = part.stop - part.start
        grads, rows, grad_both, grad_product, product = (buffer[:count] for buffer in buffers)
        grads = plan.gather(grad, part, grads, blank=True)
        for a, b, c in zip(grads.split(sizes), down[experts], grad_product.split(sizes), strict=True):
            torch.mm(a, b.t(), out=c)
        (gate, up), (grad_gate, grad_up) = hidden[part].chunk(2, dim=-1), grad_both.chunk(2, dim=-1)
        _silu_into(gate, out=product)
        if grad_weights is not None:
            grad_weights[part] = (grad_product * product).mul_(up).sum(-1, dtype=grad_weights.dtype)
        if plan.weights is not None:
            grad_product.mul_(plan.scales(part, x.dtype))
        torch.mul(grad_product, product, out=grad_up)
        product.mul_(up)
        if plan.weights is not None:
            product.mul_(plan.scales(part, x.dtype))
        _silu_backward_into(grad_product.mul_(up), gate, grad_input=grad_gate)
        if grad_down is not None:
            for a, b, c in zip(product.split(sizes), grads.split(sizes), grad_down[experts], strict=True):
                torch.mm(a.t(), b, out=c)
        if grad_gate_up is not None:
            given = plan.gather(x, part, rows)
            for a, b, c in zip(given.split(sizes), grad_both.split(sizes), grad_gate_up[experts], strict=True):
                torch.mm(a.t(), b, out=c)
        if grad_x is not None:
            for a, b, c in zip(grad_both.split(sizes), gate_up[experts], rows.split(sizes), strict=True):
                torch.mm(a, b.t(), out=c)
            plan.put(grad_x, rows, part)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None,
        None if grad_weights is None else plan.of_pairs(grad_weights),
        grad_gate_up,
        grad_down,
        None,
        None,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as large as what is kept


_mixture.register_autograd(_backward, setup_context=_keep)


@dataclass
class Plan:
    """Which rows are worked on together, where they come from and where they go."""

    tokens: Tensor | None
    """int64 [rows]: the token of every row; None where rows are taken as they come."""
    weights: Tensor | None
    """float32 (or wider) [rows], 0 in rows that fill up; None without tokens."""
    places: Tensor | None
    """int64 [S]: the row of each pair, where rows were added that fill up."""
    counts: list[int]
    """Pairs of each expert."""
    sizes: list[int]
    """Rows of each expert."""
    at_once: int

    @classmethod
    def of(
        cls, tokens_S: Tensor | None, weights_S: Tensor | None, ends_E: Tensor, dtype: torch.dtype, width: int
    ) -> Plan:
        precise = torch.promote_types(dtype, torch.float32)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        counts, at_once = counts_E.tolist(), max(1, _AT_ONCE // width)
        if dtype == precise:
            return cls(tokens_S, weights_S, None, counts, counts, at_once)
        # Below float32 oneDNN prepares a kernel for every number of rows it has not seen lately, which takes longer
        # than the product itself. So every expert gets a multiple of 32 rows, and there are few such numbers.
        sizes_E = (counts_E + 31) // 32 * 32
        shifts_E = (sizes_E.cumsum(0) - sizes_E) - (ends_E - counts_E)
        numbers = torch.arange(sum(counts))
        places = numbers + shifts_E.repeat_interleave(counts_E, output_size=len(numbers))
        sizes = sizes_E.tolist()
        tokens = places.new_zeros(sum(sizes)).index_copy_(0, places, numbers if tokens_S is None else tokens_S)
        weights = None
        if weights_S is not None:
            weights = torch.zeros(sum(sizes), dtype=precise).index_copy_(0, places, weights_S.to(precise))
        return cls(tokens, weights, places, counts, sizes, at_once)

    def groups(self) -> Iterator[tuple[slice, slice, list[int]]]:
        """Rows, experts, and the rows of each of these experts."""
        for first, last in self._bounds():
            start, sizes = sum(self.sizes[:first]), self.sizes[first:last]
            yield slice(start, start + sum(sizes)), slice(first, last), sizes

    @property
    def largest(self) -> int:
        """Rows of the largest group."""
        return max(sum(self.sizes[first:last]) for first, last in self._bounds())

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    def room_for(self, x: Tensor) -> Tensor:
        """What `put` puts rows into: sums are taken in float32 or wider."""
        if self.weights is None:
            return torch.empty_like(x)
        return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))

    def gather(self, x: Tensor, part: slice, into: Tensor, blank: bool = False) -> Tensor:
        """Some rows of x, perhaps in `into`. Rows that fill up are zero with `blank`, and anything without."""
        if self.tokens is None:
            return x[part]
        torch.index_select(x, 0, self.tokens[part], out=into)
        if blank and self.weights is None and self.places is not None:
            filled = self._pairs(part)
            empty = torch.ones(len(into), dtype=torch.bool).index_fill_(0, self.places[filled] - part.start, False)
            into.index_fill_(0, empty.nonzero().squeeze(1), 0)
        return into

    def put(self, out: Tensor, rows: Tensor, part: slice) -> None:
        """Adds rows up where their tokens are; without weights every row has a place of its own."""
        if self.weights is not None and self.tokens is not None:
            out.index_add_(0, self.tokens[part], rows.to(out.dtype))
        elif self.places is None:
            out[part] = rows
        else:
            pairs = self._pairs(part)
            torch.index_select(rows, 0, self.places[pairs] - part.start, out=out[pairs])

    def scales(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Weights of some rows, to multiply with: [rows, 1]."""
        assert self.weights is not None
        return self.weights[part].to(dtype).unsqueeze(1)

    def of_pairs(self, rows: Tensor) -> Tensor:
        """What stands in the rows of pairs."""
        return rows if self.places is None else rows.index_select(0, self.places)

    def _pairs(self, part: slice) -> slice:
        """The pairs whose rows these are."""
        first, rows = 0, 0
        while rows < part.start:
            rows, first = rows + self.sizes[first], first + 1
        last = first
        while rows < part.stop:
            rows, last = rows + self.sizes[last], last + 1
        start = sum(self.counts[:first])
        return slice(start, start + sum(self.counts[first:last]))

    def _bounds(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) expert of each group."""
        first, rows = 0, 0
        for expert, size in enumerate(self.sizes):
            if rows and rows + size > self.at_once:
                yield first, expert
                first, rows = expert, 0
            rows += size
        yield first, len(self.sizes)
