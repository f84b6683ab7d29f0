"""Many questions put to a model: dealt out to ranks, packed into batches, scored against the answers expected.

Two scores. Teacher-forced: every token of the answer is the likeliest one after those before it. Greedy: the model
answers by itself, and what it says is compared as text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aria_train.eval.generate import answer_batch, opening
from aria_train.eval.progress import Advance
from aria_train.eval.prompts import Prompt, pack_prompts
from aria_train.model import AriaModel
from aria_train.parallel.collectives import gather_objects
from aria_train.parallel.mesh import Meshes
from aria_train.parallel.shard import release_parameters


@dataclass(frozen=True)
class Questions:
    """Prompts with expected answers, each written only when it is its turn."""

    lengths: Sequence[int]
    """Tokens of each, about."""
    write: Callable[[int], Prompt]
    """Question number -> prompt and answer."""


@dataclass(frozen=True)
class Greedy:
    """How a model answers by itself."""

    spare_tokens: int
    """Tokens it may say beyond the expected answer's number."""
    stop: Collection[int]
    is_right: Callable[[list[int], list[int]], bool]
    """(what it said, expected answer) -> whether that is right."""


@dataclass(frozen=True)
class Score:
    """What became of one question."""

    exact: bool
    """Teacher-forced: all tokens of the answer are right."""
    loss: float
    """Mean cross-entropy of the answer's tokens, in nats."""
    said: list[int] | None = None
    """What the model says by itself, without the token it stopped at."""
    said_right: bool | None = None


@torch.no_grad()
def score_questions(
    model: AriaModel, meshes: Meshes, questions: Questions, batch_tokens: int, greedy: Greedy | None, advance: Advance
) -> list[Score]:
    """Scores of all questions, on every rank. Collective.

    `batch_tokens`: tokens of a forward pass, about; a question longer than that has one to itself.
    """
    model.eval()
    mine: dict[int, Score] = {}
    for shares in deal(questions.lengths, meshes.world_size, batch_tokens):
        numbers = shares[meshes.rank]
        prompts = [questions.write(number) for number in numbers]
        scores = _teacher_forced(model, meshes, prompts)
        if greedy is not None:
            scores = _by_itself(model, prompts, scores, greedy)
        mine |= zip(numbers, scores, strict=True)
        advance(sum(map(len, shares)))
    release_parameters(model)
    merged = {number: score for part in gather_objects(mine) for number, score in part.items()}
    return [merged[number] for number in range(len(questions.lengths))]


def deal(lengths: Sequence[int], num_ranks: int, batch_tokens: int) -> Iterator[list[list[int]]]:
    """Batches of questions of similar length, one per rank at a time. All ranks get as many, some of them empty."""
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not batches or lengths[number] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(number)
        room -= lengths[number]
    for first in range(0, len(batches), num_ranks):
        shares = batches[first : first + num_ranks]
        yield shares + [[]] * (num_ranks - len(shares))


def _teacher_forced(model: AriaModel, meshes: Meshes, prompts: list[Prompt]) -> list[Score]:
    batch = (pack_prompts(prompts, model.config.vision) if prompts else opening([], model)).to(meshes.device)
    logits = model.target_logits(batch)
    expected = torch.tensor([token for prompt in prompts for token in prompt.answer], device=meshes.device).long()
    right = (logits.argmax(-1) == expected).tolist()
    losses = F.cross_entropy(logits, expected, reduction="none").tolist()
    scores, at = [], 0
    for prompt in prompts:
        span = slice(at, at + len(prompt.answer))
        scores.append(Score(all(right[span]), sum(losses[span]) / len(prompt.answer)))
        at = span.stop
    return scores


def _by_itself(model: AriaModel, prompts: list[Prompt], scores: list[Score], greedy: Greedy) -> list[Score]:
    longest = max((len(prompt.answer) for prompt in prompts), default=0)
    answers = answer_batch(model, prompts, longest + greedy.spare_tokens, greedy.stop)
    return [
        dataclasses.replace(score, said=said, said_right=greedy.is_right(said, prompt.answer))
        for prompt, score, said in zip(prompts, scores, answers, strict=True)
    ]
