"""Attention over packed documents: each attends only within itself, or queries of an image over its patches."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.batch import ImageBatch
from aria_train.kernels.attention import is_short, short_attention


def document_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int, causal: bool) -> Tensor:
    """Softmax attention within each document of a packed sequence.

    q: [T, heads, d]; k, v: [T, kv_heads, d], kv_heads dividing heads. starts: int32 [D + 1], first token of each
    document, then T. Returns [T, heads, d]. Scores are scaled by 1 / sqrt(d).
    """
    if not q.shape[0]:
        return q + 0 * (k.sum() + v.sum())  # no tokens: keep k and v in the graph, so that every rank reduces them
    if _has_varlen(q):
        groups = q.shape[1] // k.shape[1]
        k, v = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
        return _varlen(q, k, v, starts, starts, max_length, max_length, causal)
    lengths = [length for length in starts.diff().tolist() if length]
    return _by_document(q, k, v, lengths, lengths, causal)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, images: ImageBatch, max_patches: int) -> Tensor:
    """Softmax attention of each image's queries over its own patches.

    q: [M, heads, d], image after image; k, v: [P, heads, d], patches in the same order, at most `max_patches` of an
    image. Returns [M, heads, d].
    """
    if _has_varlen(q):
        assert images.query_starts is not None
        return _varlen(q, k, v, images.query_starts, images.starts, max(images.num_queries), max_patches)
    return _by_document(q, k, v, images.num_queries, images.starts.diff().tolist(), causal=False)


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


def _has_varlen(q: Tensor) -> bool:
    """Whether one flash attention takes all documents. It does not wait for the device."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.device.type != "cpu"


def _by_document(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], causal: bool) -> Tensor:
    """Document by document, of so many queries and keys each. Neighbours of one size go through the kernel together:
    images mostly do."""
    runs = [(len(list(run)), *sizes) for sizes, run in itertools.groupby(zip(queries, keys, strict=True))]
    q_parts = q.split([count * length for count, length, _ in runs])
    k_parts, v_parts = (x.split([count * length for count, _, length in runs]) for x in (k, v))
    attended = [
        _equals(q.unflatten(0, (count, -1)), k.unflatten(0, (count, -1)), v.unflatten(0, (count, -1)), causal)
        for (count, *_), q, k, v in zip(runs, q_parts, k_parts, v_parts, strict=True)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _equals(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Documents of equal length, [documents, length, heads, d] each, through kernels that never hold their scores, or
    those of a few short ones at a time. Returns [documents * length, heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_short(q, k):
        out = short_attention(q, k, v, causal)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool = False,
) -> Tensor:
    """All documents in one flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, query_starts, key_starts, max_queries, max_keys, window_size=window)
    assert isinstance(out, Tensor)
    return out
