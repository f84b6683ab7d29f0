"""Keys and values of documents that are being continued, so that a new token costs one position, not all before it.

Shape legend: B documents, T new tokens of all of them, L room per document, N heads, M key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aria_train.model.attention import cached_attention, document_attention

_SPARE = 256
"""Room made beyond what is needed, so that documents are seldom copied."""


class Cache:
    """A batch of documents. The first forward pass takes all of their tokens so far, packed; each pass after it takes
    one token more of every document, in the same order."""

    def __init__(self, num_documents: int) -> None:
        self.lengths = [0] * num_documents
        """Tokens of each document so far."""
        self._keys: dict[int, Tensor] = {}
        """By layer: [B, L, M, D]."""
        self._values: dict[int, Tensor] = {}

    def place(self, starts: Tensor) -> Tensor:
        """Where the next tokens go, of which document i has starts[i]:starts[i + 1] (int32 [B + 1]): their positions,
        int64 [T]. Every layer's `attend` follows."""
        counts = starts.diff().tolist()
        assert len(counts) == len(self.lengths), f"{len(counts)} documents, {len(self.lengths)} in the cache"
        self._is_first = not any(self.lengths)
        assert self._is_first or set(counts) == {1}, "a document goes on by one token at a time"
        self._rows = torch.repeat_interleave(starts.diff(), output_size=sum(counts))
        past = torch.tensor(self.lengths, dtype=torch.int64, device=starts.device)
        self._positions = torch.arange(sum(counts), device=starts.device) + (past - starts[:-1])[self._rows]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> Tensor:
        """Keeps a layer's new keys and values, [T, M, D] each, and lets its queries, [T, N, D], look at all that their
        document has. Returns [T, N, D]."""
        keys, values = self._extend(self._keys, layer, k), self._extend(self._values, layer, v)
        if self._is_first:
            return document_attention(q, k, v, starts, max_length, causal=True)
        return cached_attention(q, keys, values, self._positions + 1)

    def _extend(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """All of a layer's keys or values, with the new ones in their places."""
        longest = max(self.lengths, default=0)
        held = store.get(layer)
        if held is None or held.shape[1] < longest:
            # Zeros, because attention multiplies what its mask hides by zero: stray infinities would show.
            larger = new.new_zeros(len(self.lengths), longest + _SPARE, *new.shape[1:])
            if held is not None:
                larger[:, : held.shape[1]] = held
            held = store[layer] = larger
        held[self._rows, self._positions] = new
        return held[:, :longest]
