"""Needle in a haystack: does a model find one fact in a long context, wherever it stands?

A grid of lengths by depths. Text needles are facts in a corpus (`data.needles`); visual needles are questions about one
image among many others (V-NIAH, Zhang et al., arXiv 2406.16852). Depth 0 is the beginning, 1 the end. A cell is found
when most of its trials are.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from aria_train.data.text.needles import Haystack, draw_facts
from aria_train.errors import ConfigError
from aria_train.eval.progress import Advance, no_progress
from aria_train.eval.prompts import Picture, Prompt, PromptWriter
from aria_train.eval.scoring import Greedy, Questions, score_questions
from aria_train.model import AriaModel
from aria_train.parallel.mesh import Meshes

FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Lengths of the default grid relative to the context: 1, 2, 4, 8, 16, 32, 48 and 64K for 64K."""
SHORTEST = 128
"""Tokens below which a default grid does not go: a needle and its question need most of them."""
_SPARE_TOKENS = 8
"""Tokens that a model may say beyond the answer, to show that it goes on where it should not."""


@dataclass(frozen=True)
class Grid:
    """What is tried."""

    lengths: Sequence[int]
    """Tokens, from the haystack's first to the answer's last."""
    depths: Sequence[float]
    """0 to 1"""
    trials: int
    """Needles per cell, each another one in another haystack."""

    def cells(self) -> list[tuple[int, float, int]]:
        """(length, depth, trial) of every needle."""
        return list(itertools.product(self.lengths, self.depths, range(self.trials)))


class Needles(Protocol):
    """Questions that only the needle answers."""

    name: str

    def write(self, length: int, depth: float, trial: int) -> Prompt:
        """A haystack of about `length` tokens with a needle in it, and the question; the same whenever it is asked for.

        Raises ConfigError if a needle and its question are longer than that.
        """
        ...

    def is_right(self, said: list[int], expected: list[int]) -> bool:
        """Whether what a model says by itself gives the expected answer."""
        ...


class TextNeedles:
    """Facts in a corpus, none of which occurs in training data made with `data.needles`."""

    name = "text"

    def __init__(self, haystack: Haystack, seed: int = 0) -> None:
        self.haystack, self.seed = haystack, seed

    def write(self, length: int, depth: float, trial: int) -> Prompt:
        random = _random(self.seed, length, depth, trial)
        fact = draw_facts(random, 1, held_out=True)[0]
        question, answer = self.haystack.encode_pair(fact.question, fact.answer)
        room = length - len(question) - len(answer)
        prompt = self.haystack.hide(room, [(fact, depth)], random) + question
        _check_fits(len(prompt) + len(answer), length)
        return Prompt(prompt, answer=answer)

    def is_right(self, said: list[int], expected: list[int]) -> bool:
        """The first number said is the one asked for."""
        decode = self.haystack.tokenizer.decode
        found = re.match(r"\s*(\d+)", decode(said))
        return found is not None and found[1] == decode(expected).strip()


class VisualNeedles:
    """A question about one image among as many others as fit."""

    name = "visual"

    def __init__(
        self, questions: Sequence[Prompt], haystack: Sequence[Picture], writer: PromptWriter, seed: int = 0
    ) -> None:
        """`questions` with one or more images each; none of the images in `haystack` should answer them too."""
        self.questions, self.haystack, self.writer, self.seed = questions, haystack, writer, seed

    def write(self, length: int, depth: float, trial: int) -> Prompt:
        random = _random(self.seed, length, depth, trial)
        question = self.questions[int(random.integers(len(self.questions)))]
        room = length - question.num_tokens
        _check_fits(question.num_tokens, length)
        others: list[Picture] = []
        for index in itertools.cycle(random.permutation(len(self.haystack)).tolist()):
            room -= len(self.writer.image_ids(self.haystack[index]))
            if room < 0:
                break
            others.append(self.haystack[index])
        return surround(question, others, int(depth * len(others)), self.writer)

    def is_right(self, said: list[int], expected: list[int]) -> bool:
        decode = self.writer.tokenizer.decode
        return bool(decode(said).strip() == decode(expected).strip())


def surround(question: Prompt, others: Sequence[Picture], before: int, writer: PromptWriter) -> Prompt:
    """The question with other images around its own, `before` of them before."""
    ids, image = question.token_ids, writer.model.image_token_id
    first = ids.index(image) - 1
    behind = len(ids) - ids[::-1].index(image) + 1
    left, right = (
        list(itertools.chain.from_iterable(map(writer.image_ids, part))) for part in (others[:before], others[before:])
    )
    pictures = [*others[:before], *question.pictures, *others[before:]]
    return Prompt([*ids[:first], *left, *ids[first:behind], *right, *ids[behind:]], pictures, question.answer)


def _random(seed: int, length: int, depth: float, trial: int) -> np.random.Generator:
    return np.random.default_rng([seed, length, round(depth * 10_000), trial])


def _check_fits(num_tokens: int, length: int) -> None:
    if num_tokens > length:
        raise ConfigError(
            f"a needle and its question have {num_tokens} tokens, more than a haystack of length {length}. Let the "
            "shortest length be longer."
        )


@dataclass
class NeedleResult:
    """Scores of a grid: [lengths][depths] shares of trials found."""

    name: str
    grid: Grid
    teacher_forced: list[list[float]]
    greedy: list[list[float]] | None
    loss: list[list[float]]
    """Mean cross-entropy of the answers' tokens, in nats."""

    @property
    def accuracy(self) -> float:
        """Share of all needles whose answer is right, teacher-forced."""
        return statistics.fmean(itertools.chain.from_iterable(self.teacher_forced))

    @property
    def cells_found(self) -> float:
        """Share of cells in which most needles are found, teacher-forced."""
        return statistics.fmean(share > 0.5 for share in itertools.chain.from_iterable(self.teacher_forced))

    def as_json(self) -> dict[str, Any]:
        greedy = None
        if self.greedy is not None:
            greedy = statistics.fmean(itertools.chain.from_iterable(self.greedy))
        return {
            "needle": self.name,
            "accuracy": self.accuracy,
            "greedy_accuracy": greedy,
            "cells_found": self.cells_found,
            "lengths": list(self.grid.lengths),
            "depths": list(self.grid.depths),
            "trials": self.grid.trials,
            "teacher_forced": self.teacher_forced,
            "greedy": self.greedy,
            "loss": self.loss,
        }


def default_lengths(context_length: int) -> list[int]:
    """Lengths up to the context, that of the published grid for 64K."""
    lengths = [int(context_length * fraction) for fraction in FRACTIONS]
    return [length for length in lengths if length >= SHORTEST] or [context_length]


def even_depths(count: int) -> list[float]:
    """`count` depths from the beginning to the end."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def run_needles(
    model: AriaModel,
    meshes: Meshes,
    needles: Needles,
    grid: Grid,
    batch_tokens: int,
    stop: Collection[int] | None = None,
    advance: Advance = no_progress,
) -> NeedleResult:
    """Looks for every needle of the grid, teacher-forced and, if tokens to `stop` at are given, greedily. Collective.

    Raises ConfigError for lengths that the model has no positions for.
    """
    most = model.config.max_positions
    if max(grid.lengths) > most:
        raise ConfigError(f"a haystack of {max(grid.lengths):,} tokens is beyond model.max_positions {most:,}.")
    cells = grid.cells()
    questions = Questions([length for length, _, _ in cells], lambda number: needles.write(*cells[number]))
    greedy = None if stop is None else Greedy(_SPARE_TOKENS, stop, needles.is_right)
    scores = score_questions(model, meshes, questions, batch_tokens, greedy, advance)
    return NeedleResult(
        needles.name,
        grid,
        _table([score.exact for score in scores], grid),
        None if greedy is None else _table([bool(score.said_right) for score in scores], grid),
        _table([score.loss for score in scores], grid),
    )


def _table(values: Sequence[float], grid: Grid) -> list[list[float]]:
    """Means over trials: [lengths][depths]."""
    means: list[list[float]] = (
        np.array(values, float).reshape(len(grid.lengths), len(grid.depths), grid.trials).mean(2).tolist()
    )
    return means
