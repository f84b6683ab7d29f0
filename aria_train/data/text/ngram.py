"""Unigram and bigram models of a corpus: what a trained model must beat by far to have learned more than counts.

They are scored on the very positions the model is scored on: every target of a window, documents apart, the first token
of a document no target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aria_train.batch import IGNORE_LABEL, MicroBatch
from aria_train.data.text.corpus import find_prefixes
from aria_train.data.text.indexed import IndexedCorpus
from aria_train.errors import DataError

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class NgramScore:
    """Mean cross-entropy in nats per target."""

    unigram: float
    bigram: float
    targets: int


class NgramModel:
    """Unigrams with one added to every count, and bigrams by absolute discounting interpolated with them:

        p(w | v) = max(c(v w) - d, 0) / c(v) + d * followers(v) / c(v) * p(w),   d = n1 / (n1 + 2 n2)

    (Ney, Essen, Kneser 1994; n1 and n2 are the numbers of pairs seen once and twice). Both sum to 1.
    """

    def __init__(self, pairs: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int) -> None:
        """`pairs` int64, sorted and distinct: previous token * vocab_size + next token; `counts` of each."""
        self.vocab_size, self._pairs, self._counts = vocab_size, pairs, counts
        previous, following = np.divmod(pairs, vocab_size)
        occurrences = np.bincount(following, counts, vocab_size) + 1
        self._unigram = occurrences / occurrences.sum()
        self._contexts = np.bincount(previous, counts, vocab_size)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self._discount = once / (once + 2 * twice) if once else 0.5
        self._followers = np.bincount(previous, minlength=vocab_size)

    @classmethod
    def from_corpora(cls, paths: Sequence[str | Path], vocab_size: int) -> NgramModel:
        """Counts every pair of neighbours within a document of text corpora (prefixes, or folders of pairs)."""
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for chunk in _chunks([IndexedCorpus(prefix) for prefix in find_prefixes(paths)], vocab_size):
            pairs, inverse = np.unique(np.concatenate([pairs, chunk]), return_inverse=True)
            weights = np.concatenate([counts, np.ones(len(chunk), np.int64)])
            counts = np.bincount(inverse, weights, len(pairs)).astype(np.int64)
        return cls(pairs, counts, vocab_size)

    def unigram_probability(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(token)"""
        return self._unigram[tokens]

    def bigram_probability(self, previous: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(token | previous); the unigram's after a token never seen with a successor."""
        lower = self._unigram[tokens]
        if not len(self._pairs):
            return lower
        wanted = previous * self.vocab_size + tokens
        at = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        seen = np.where(self._pairs[at] == wanted, self._counts[at], 0)
        context = np.maximum(self._contexts[previous], 1)
        share = np.maximum(seen - self._discount, 0) / context
        rest = self._discount * self._followers[previous] / context
        return np.where(self._contexts[previous] > 0, share + rest * lower, lower)

    def score(self, batches: Iterable[MicroBatch]) -> NgramScore:
        """Cross-entropy over all targets of some batches, such as `validation_batches` gives."""
        unigram = bigram = 0.0
        targets = 0
        for batch in batches:
            labels = batch.labels.numpy()
            at = labels != IGNORE_LABEL
            previous, tokens = batch.token_ids.numpy()[at], labels[at]
            unigram -= float(np.log(self.unigram_probability(tokens)).sum())
            bigram -= float(np.log(self.bigram_probability(previous, tokens)).sum())
            targets += len(tokens)
        if not targets:
            raise DataError("there is no target to score: data.validation has no source, or only empty ones.")
        return NgramScore(unigram / targets, bigram / targets, targets)


def _chunks(corpora: Sequence[IndexedCorpus], vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """Encoded pairs of neighbours, some millions at a time."""
    pending: list[NDArray[np.int64]] = []
    size = 0
    for corpus in corpora:
        for document in range(corpus.num_documents):
            tokens = corpus.read(document).astype(np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise DataError(
                    f"{corpus.prefix}: document {document} holds token ids {tokens.min()} to {tokens.max()}, outside a "
                    f"vocabulary of {vocab_size}."
                )
            pending.append(tokens[:-1] * vocab_size + tokens[1:])
            size += len(tokens)
            if size >= _CHUNK_TOKENS:
                yield np.concatenate(pending)
                pending, size = [], 0
    if pending:
        yield np.concatenate(pending)
