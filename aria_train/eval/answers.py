"""Questions about images or text with known answers, put to a model: exact-match accuracy, and what it said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aria_train.config import ModelConfig
from aria_train.data.multimodal.corpus import check_fits
from aria_train.data.multimodal.formats import BadRecord, Encoder, Recipe
from aria_train.data.multimodal.store import META, Reader, Sample
from aria_train.data.prepare.multimodal_inputs import read_records, split_into_units
from aria_train.data.prepare.text_inputs import Skipped
from aria_train.errors import DataError
from aria_train.eval.progress import Advance, no_progress
from aria_train.eval.prompts import Prompt, PromptWriter
from aria_train.eval.scoring import Greedy, Questions, score_questions
from aria_train.model import AriaModel
from aria_train.parallel.mesh import Meshes

_SPARE_TOKENS = 4
"""Tokens that a model may say beyond the answer, so that one that does not stop is seen not to."""


@dataclass(frozen=True)
class Answer:
    """What became of one question."""

    expected: str
    said: str
    exact: bool
    """Teacher-forced: every token of the answer and its closing tag is the likeliest."""

    @property
    def right(self) -> bool:
        """The model says the answer by itself, and no more."""
        return self.said == self.expected


@dataclass(frozen=True)
class AnswerResult:
    """Answers to a set of questions, in order."""

    answers: list[Answer]

    @property
    def accuracy(self) -> float:
        """Share of questions whose answer the model says by itself, word for word."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    def as_json(self) -> dict[str, Any]:
        exact = sum(answer.exact for answer in self.answers) / len(self.answers)
        return {"questions": len(self.answers), "accuracy": self.accuracy, "teacher_forced": exact}


def answer_questions(
    model: AriaModel,
    meshes: Meshes,
    prompts: Sequence[Prompt],
    writer: PromptWriter,
    batch_tokens: int,
    advance: Advance = no_progress,
) -> AnswerResult:
    """Puts the prompts, which hold the expected answers, to the model. Collective."""

    def text(ids: Sequence[int]) -> str:
        return str(writer.tokenizer.decode(list(ids))).strip()

    stop = {model.config.eos_token_id, writer.token("<|im_end|>")}
    greedy = Greedy(_SPARE_TOKENS, stop, lambda said, expected: text(said) == text(expected))
    questions = Questions([prompt.num_tokens for prompt in prompts], lambda number: prompts[number])
    scores = score_questions(model, meshes, questions, batch_tokens, greedy, advance)
    return AnswerResult(
        [
            Answer(text(prompt.answer), text(score.said or []), score.exact)
            for prompt, score in zip(prompts, scores, strict=True)
        ]
    )


def read_questions(path: str | Path, writer: PromptWriter, limit: int | None = None) -> list[Prompt]:
    """The last question of every conversation of a prepared multimodal folder, or of a file of such records.

    Raises DataError where there is none, for a folder that was not prepared for the model, and for a record of a file
    that cannot be used.
    """
    samples = read_samples(path, writer.model) if (Path(path) / META).is_file() else _records(str(path), writer)
    prompts: list[Prompt] = []
    for sample in samples:
        if limit is not None and len(prompts) >= limit:
            break
        prompt = writer.asked(sample)
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: holds no question with an answer. Give a corpus of conversations.")
    return prompts


def read_samples(folder: str | Path, model: ModelConfig) -> Iterator[Sample]:
    """All samples of a prepared multimodal folder. Raises DataError if it was not prepared for the model."""
    reader = Reader(Path(folder))
    check_fits(reader, model)
    return (reader.sample(row) for row in range(len(reader)))


def _records(path: str, writer: PromptWriter) -> Iterator[Sample]:
    if not Path(path).is_file():
        raise DataError(f"{path}: neither a prepared multimodal folder nor a file of conversations.")
    recipe = Recipe(str(writer.folder), writer.model, "chat", "assistant", writer.image_size, check_images=False)
    encoder = Encoder(recipe)
    for unit in split_into_units([path]):
        for item in read_records(unit, recipe.columns):
            if isinstance(item, Skipped):
                raise DataError(f"{path}, line {item.line}: {item.reason} {item.detail}".rstrip() + ".")
            line, record = item
            try:
                yield encoder.encode(record, f"{path}:{line}")
            except BadRecord as error:
                raise DataError(f"{path}, line {line}: {error.reason}: {error.detail}.") from None
