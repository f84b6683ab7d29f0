"""Attention over packed documents: each attends only within itself."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def document_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int, causal: bool) -> Tensor:
    """Softmax attention within each document of a packed sequence.

    q: [T, heads, d]; k, v: [T, kv_heads, d], kv_heads dividing heads. starts: int32 [D + 1], first token of each
    document, then T. Returns [T, heads, d]. Scores are scaled by 1 / sqrt(d).
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _flash_varlen(q, k, v, starts, max_length, causal)
    # Neighbours of one length go through the kernel together: images mostly do.
    lengths = (length for length in starts.diff().tolist() if length)
    runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
    if not runs:
        return q + 0 * (k.sum() + v.sum())  # no tokens: keep k and v in the graph, so that every rank reduces them
    sizes = [count * length for count, length in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    attended = [_equals(q.unflatten(0, r), k.unflatten(0, r), v.unflatten(0, r), causal) for r, q, k, v in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """One query per document over all that its document has so far.

    q: [B, heads, d]; keys, values: [B, L, kv_heads, d], of which document i has the first lengths[i] (int64 [B]).
    Returns [B, heads, d].
    """
    mask = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask[:, None, None], enable_gqa=grouped)
    return out.squeeze(2)


def _equals(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Documents of equal length, [documents, length, heads, d] each, through PyTorch's own kernel, which never holds
    their scores. Returns [documents * length, heads, d]."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, starts, starts, max_length, max_length, window_size=window)
    assert isinstance(out, Tensor)
    return out
