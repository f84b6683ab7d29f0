import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from aria_train.data.loader import pack_windows, validation_batches
from aria_train.data.text import ngram
from aria_train.data.text.ngram import NgramModel
from aria_train.data.window import Window
from aria_train.errors import DataError
from tests.data.corpora import random_documents, run_config, write_corpus

VOCABULARY = 30


def markov_documents(count: int, seed: int) -> list[list[int]]:
    """Each token is mostly one more than the last, so that a bigram model knows much more than a unigram."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        document = [int(rng.integers(3, VOCABULARY))]
        for _ in range(40):
            follow = (document[-1] + 1) % VOCABULARY
            document.append(follow if rng.random() < 0.9 else int(rng.integers(3, VOCABULARY)))
        documents.append(document)
    return documents


@pytest.fixture
def model(tmp_path: Path) -> NgramModel:
    return NgramModel.from_corpora([write_corpus(tmp_path / "train", markov_documents(50, 0))], VOCABULARY)


def test_probabilities_sum_to_one(model: NgramModel) -> None:
    tokens = np.arange(VOCABULARY)
    assert model.unigram_probability(tokens).sum() == pytest.approx(1)
    for previous in tokens:
        probabilities = model.bigram_probability(np.full(VOCABULARY, previous), tokens)
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1)


def test_probabilities_are_those_of_the_formula(model: NgramModel) -> None:
    pairs = Counter(pair for document in markov_documents(50, 0) for pair in pairwise(document))
    unigrams, contexts, followers = Counter[int](), Counter[int](), Counter[int]()
    for (previous, token), count in pairs.items():
        unigrams[token] += count
        contexts[previous] += count
        followers[previous] += 1
    once, twice = (sum(count == wanted for count in pairs.values()) for wanted in (1, 2))
    discount = once / (once + 2 * twice)
    for previous, token in [(5, 6), (7, 20), (29, 3), (4, 0)]:
        lower = (unigrams[token] + 1) / (sum(unigrams.values()) + VOCABULARY)
        higher = max(pairs[previous, token] - discount, 0) / contexts[previous]
        expected = higher + discount * followers[previous] / contexts[previous] * lower
        assert model.unigram_probability(np.array([token]))[0] == pytest.approx(lower)
        assert model.bigram_probability(np.array([previous]), np.array([token]))[0] == pytest.approx(expected)


def test_targets_are_those_the_model_is_scored_on(tmp_path: Path, model: NgramModel) -> None:
    held_out = markov_documents(10, 1)
    config = run_config(tmp_path / "run", {"held": write_corpus(tmp_path / "held", held_out)}, context_length=50)
    score = model.score(validation_batches(config))
    pairs = np.array([pair for document in held_out for pair in pairwise(document)])
    assert score.targets == len(pairs) == 10 * 40
    assert score.unigram == pytest.approx(-np.log(model.unigram_probability(pairs[:, 1])).mean())
    assert score.bigram == pytest.approx(-np.log(model.bigram_probability(pairs[:, 0], pairs[:, 1])).mean())
    assert score.bigram < score.unigram - 1 < math.log(VOCABULARY)


def test_masked_positions_are_not_scored(model: NgramModel) -> None:
    ids = np.array([5, 6, 7], np.int32)
    window = Window(ids, np.array([6, -100, 8], np.int32), np.array([3], np.int32))
    assert model.score([pack_windows([window], [0])]).targets == 2


def test_counting_in_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = [write_corpus(tmp_path / f"{n}", random_documents(40, 30, seed=n, vocab_size=30)) for n in range(2)]
    whole = NgramModel.from_corpora(prefixes, VOCABULARY)
    monkeypatch.setattr(ngram, "_CHUNK_TOKENS", 50)
    chunked = NgramModel.from_corpora([tmp_path], VOCABULARY)
    previous, tokens = (grid.ravel() for grid in np.meshgrid(np.arange(VOCABULARY), np.arange(VOCABULARY)))
    expected = whole.bigram_probability(previous, tokens)
    np.testing.assert_array_equal(chunked.bigram_probability(previous, tokens), expected)


def test_what_cannot_be_counted_or_scored(tmp_path: Path, model: NgramModel) -> None:
    with pytest.raises(DataError, match="document 1 holds token ids 3 to 99, outside a vocabulary of 30"):
        NgramModel.from_corpora([write_corpus(tmp_path / "a", [[3, 4], [3, 99]])], VOCABULARY)
    with pytest.raises(DataError, match="no target to score"):
        model.score([])


def test_a_corpus_without_pairs_knows_only_that_every_token_is_possible(tmp_path: Path) -> None:
    model = NgramModel.from_corpora([write_corpus(tmp_path / "a", [[5], []])], VOCABULARY)
    assert model.bigram_probability(np.array([5]), np.array([6]))[0] == pytest.approx(1 / VOCABULARY)
