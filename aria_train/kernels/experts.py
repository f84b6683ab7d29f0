"""Experts on a CPU: a few of them at a time, so that what lies between their products stays small and in cache.

Tokens are gathered as they are needed, in the forward pass and again in the backward pass, and outputs are added up
where they belong: no tensor holds every token once per expert. Only what `gate` and `up` made is kept.

Shape legend: T tokens, S (token, expert) pairs sorted by expert, H hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aria_train.kernels.batches import Plan

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
    for group in plan.groups:
        count = group.num_rows
        rows, product = plan.gather(x, group, rows_buffer[:count]), product_buffer[:count]
        both = hidden[group.rows] if keep else hidden[:count]
        gate, up = both.chunk(2, dim=-1)
        _multiply(group.cut(rows), group.share(gate_up), group.cut(both))
        _silu_into(gate, out=product).mul_(up)
        if plan.weights is not None:
            product.mul_(plan.scales(group, x.dtype))
        out = rows_buffer[:count]
        _multiply(group.cut(product), group.share(down), group.cut(out))
        plan.put(out_TH, out, group)
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
    for group in plan.groups:
        count = group.num_rows
        grads, rows, grad_both, grad_product, product = (buffer[:count] for buffer in buffers)
        grads = plan.gather(grad, group, grads, blank=True)
        grads_parts = group.cut(grads)
        _multiply(grads_parts, group.share(down.mT), group.cut(grad_product))
        (gate, up), (grad_gate, grad_up) = hidden[group.rows].chunk(2, dim=-1), grad_both.chunk(2, dim=-1)
        _silu_into(gate, out=product)
        if grad_weights is not None:
            grad_weights[group.rows] = (grad_product * product).mul_(up).sum(-1, dtype=grad_weights.dtype)
        if plan.weights is not None:
            grad_product.mul_(plan.scales(group, x.dtype))
        torch.mul(grad_product, product, out=grad_up)
        product.mul_(up)
        if plan.weights is not None:
            product.mul_(plan.scales(group, x.dtype))
        _silu_backward_into(grad_product.mul_(up), gate, grad_input=grad_gate)
        grad_both_parts = group.cut(grad_both)
        if grad_down is not None:
            _multiply([part.mT for part in group.cut(product)], grads_parts, group.share(grad_down))
        if grad_gate_up is not None:
            given = plan.gather(x, group, rows)
            _multiply([part.mT for part in group.cut(given)], grad_both_parts, group.share(grad_gate_up))
        if grad_x is not None:
            _multiply(grad_both_parts, group.share(gate_up.mT), group.cut(rows))
            plan.put(grad_x, rows, group)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None,
        None if grad_weights is None else plan.of_pairs(grad_weights),
        grad_gate_up,
        grad_down,
        None,
        None,
    )


def _multiply(left: Sequence[Tensor], right: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Batch by batch."""
    for a, b, c in zip(left, right, into, strict=True):
        torch.bmm(a, b, out=c)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as large as what is kept


_mixture.register_autograd(_backward, setup_context=_keep)
