"""Evaluations inside training: what the `evaluation` section asks for, opened once and run every so many steps.

Figures go to `evaluations.jsonl`; whole results and pictures to the run directory's `report/`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aria_train.config import NeedleConfig, RunConfig
from aria_train.data.multimodal.store import META
from aria_train.data.text.needles import Haystack
from aria_train.errors import ConfigError, DataError
from aria_train.eval.answers import AnswerResult, answer_questions, read_questions, read_samples
from aria_train.eval.experts import VISUAL_ABOVE, ExpertUse, count_expert_use
from aria_train.eval.needle import Grid, NeedleResult, Needles, TextNeedles, VisualNeedles, default_lengths, even_depths
from aria_train.eval.needle import run_needles as run_grid
from aria_train.eval.progress import Advance, no_progress
from aria_train.eval.prompts import Picture, Prompt, PromptWriter
from aria_train.model import AriaModel
from aria_train.parallel.mesh import Meshes

_SHEET_IMAGES = 64
_MOST_PICTURES = 4096
"""Images of a visual haystack held in memory, compressed."""


class Probes:
    """The evaluations a run asks for, beside the held-out loss. Raises UserError for what cannot be opened."""

    def __init__(self, config: RunConfig, meshes: Meshes) -> None:
        self.config, self.meshes = config, meshes
        asked = config.evaluation
        self._needles: list[tuple[Needles, Grid]] = []
        if asked.needle is not None:
            self._needles.append((open_text_needles(asked.needle, config), grid_of(asked.needle, config)))
        if asked.visual_needle is not None:
            self._needles.append(
                (open_visual_needles(asked.visual_needle, config), grid_of(asked.visual_needle, config))
            )
        if asked.answers is not None:
            if config.data.tokenizer is None:
                raise ConfigError("evaluation.answers compares words, but data.tokenizer names no tokenizer.")
            self._writer = PromptWriter(config.data.tokenizer, config.model)
            self._questions = read_questions(asked.answers, self._writer)
        if asked.experts and not config.data.validation:
            raise ConfigError("evaluation.experts counts over data.validation, which names no source.")

    def run(self, model: AriaModel, step: int, advance: Advance = no_progress) -> dict[str, float]:
        """Figures by name, the same on every rank; rank 0 writes the reports. Collective."""
        figures: dict[str, float] = {}
        for needles, grid in self._needles:
            result = run_grid(model, self.meshes, needles, grid, batch_tokens(self.config), advance=advance)
            figures |= needle_figures(result)
            self._write(f"needle_{needles.name}", step, result.as_json(), needle_drawing(result, self._title(step)))
        if self.config.evaluation.answers is not None:
            budget = batch_tokens(self.config)
            answers = answer_questions(model, self.meshes, self._questions, self._writer, budget, advance)
            figures["answers_accuracy"] = answers.accuracy
            drawing = answer_drawing(self._questions, answers, self._title(step))
            self._write("answers", step, answers.as_json(), drawing)
        if self.config.evaluation.experts:
            use = count_expert_use(model, self.config, self.meshes, advance)
            figures |= expert_figures(use)
            self._write("experts", step, use.as_json(), expert_drawing(use, self._title(step)))
        return figures

    def _title(self, step: int) -> str:
        return f"{self.config.stage}, step {step:,}"

    def _write(self, name: str, step: int, result: dict[str, Any], draw: Callable[[Path], None] | None) -> None:
        if self.meshes.rank == 0:
            folder = Path(self.config.train.run_dir) / "report"
            try:
                write_report(folder, f"{name}_step_{step:08d}", result, draw)
            except OSError as error:  # A full disk is no reason to end; the figures are in the metrics.
                print(f"{folder}: {name} of step {step} cannot be written: {error}", file=sys.stderr, flush=True)


def batch_tokens(config: RunConfig) -> int:
    """Tokens of a forward pass: what the run itself sends through at once."""
    return config.train.micro_batch_size * config.train.context_length


def grid_of(needle: NeedleConfig, config: RunConfig) -> Grid:
    """The grid that a section describes. Raises ConfigError for lengths that the model has no positions for."""
    lengths = needle.lengths or default_lengths(config.train.context_length)
    if max(lengths) > config.model.max_positions:
        raise ConfigError(
            f"a haystack of {max(lengths):,} tokens does not fit model.max_positions, which is "
            f"{config.model.max_positions:,}. Choose shorter lengths."
        )
    return Grid(lengths, even_depths(needle.depths), needle.trials)


def open_text_needles(needle: NeedleConfig, config: RunConfig) -> TextNeedles:
    """Needles in the section's text corpus, or in the first of `data.validation`."""
    if config.data.tokenizer is None:
        raise ConfigError("needles are written with a tokenizer, but data.tokenizer names none.")
    path = needle.haystack or _first_source(config, multimodal=False)
    return TextNeedles(Haystack(path, config.data.tokenizer))


def open_visual_needles(needle: NeedleConfig, config: RunConfig) -> VisualNeedles:
    """Questions of the section's corpus of conversations among images of its haystack, or of the first of
    `data.validation` with images that is not that corpus."""
    if config.data.tokenizer is None or needle.questions is None:
        raise ConfigError(
            "visual needles need data.tokenizer, and questions: a prepared corpus of conversations, each about an "
            "image that none of the haystack's images can be mistaken for."
        )
    writer = PromptWriter(config.data.tokenizer, config.model)
    questions = [prompt for prompt in read_questions(needle.questions, writer) if prompt.pictures]
    if not questions:
        raise DataError(f"{needle.questions}: holds no question about an image.")
    haystack = needle.haystack or _first_source(config, multimodal=True, but=needle.questions)
    pictures: list[Picture] = []
    for sample in read_samples(haystack):
        pictures += [Picture(data, place.layout) for data, place in zip(sample.images, sample.placements, strict=True)]
        if len(pictures) >= _MOST_PICTURES:
            break
    if not pictures:
        raise DataError(f"{haystack}: holds no image to hide a needle among.")
    return VisualNeedles(questions, pictures, writer)


def _first_source(config: RunConfig, multimodal: bool, but: str | None = None) -> str:
    kind = "images" if multimodal else "text"
    for source in config.data.validation:
        path = source.path if isinstance(source.path, str) else source.path[0]
        if (Path(path) / META).is_file() == multimodal and path != but:
            return path
    raise ConfigError(f"data.validation has no source of {kind} to hide a needle in; name a corpus as haystack.")


def needle_figures(result: NeedleResult) -> dict[str, float]:
    """What `evaluations.jsonl` keeps of a grid: shares of needles found, over all and by length, teacher-forced."""
    name = f"needle_{result.name}"
    figures = {f"{name}_accuracy": result.accuracy, f"{name}_cells_found": result.cells_found}
    for length, row in zip(result.grid.lengths, result.teacher_forced, strict=True):
        figures[f"{name}_accuracy/{length}"] = sum(row) / len(row)
    return figures


def expert_figures(use: ExpertUse) -> dict[str, float]:
    """What `evaluations.jsonl` keeps of a specialisation map: the share of experts that are visual, by source."""
    return {
        f"visual_experts/{name}": float((use.ratio(source) > VISUAL_ABOVE).double().mean())
        for name, source in use.domains()
    }


def needle_drawing(result: NeedleResult, title: str) -> Callable[[Path], None]:
    from aria_train.eval.figures import draw_needles

    return lambda path: draw_needles(path, result, f"{result.name.capitalize()} needle in a haystack: {title}")


def expert_drawing(use: ExpertUse, title: str) -> Callable[[Path], None]:
    from aria_train.eval.figures import draw_experts

    return lambda path: draw_experts(path, use, f"Which experts see: {title}")


def answer_drawing(prompts: Sequence[Prompt], result: AnswerResult, title: str) -> Callable[[Path], None] | None:
    """What draws the first questions with an image beside their answers; None where no question has one."""
    seen = [(p.pictures[0].data, a) for p, a in zip(prompts, result.answers, strict=True) if p.pictures]
    if not seen:
        return None
    from aria_train.eval.figures import draw_answers

    images, answers = zip(*seen[:_SHEET_IMAGES], strict=True)
    return lambda path: draw_answers(path, images, answers, title)


def write_report(folder: Path, stem: str, result: dict[str, Any], draw: Callable[[Path], None] | None) -> list[str]:
    """Writes STEM.json and, where matplotlib is installed, STEM.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    file, picture = folder / f"{stem}.json", folder / f"{stem}.png"
    aside = file.with_suffix(".json.new")
    aside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, file)
    if draw is None:
        return [str(file)]
    try:
        draw(picture)
    except ImportError as error:
        print(f"{picture} is not drawn: {error}. pip install matplotlib", file=sys.stderr)
        return [str(file)]
    return [str(file), str(picture)]
