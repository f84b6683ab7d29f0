"""Everything that can be known to be wrong with a curriculum before its first stage starts.

Reads headers and descriptions alone, never the data themselves, so it takes a moment whatever the size of the corpora.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aria_train.config import SourceConfig, check_world
from aria_train.data.multimodal import corpus as multimodal
from aria_train.data.multimodal.store import META
from aria_train.data.text import corpus as text
from aria_train.data.text import tokenizer
from aria_train.data.text.indexed import IndexedCorpus, read_metadata, strip_suffix
from aria_train.data.views import open_reader
from aria_train.errors import CheckpointError, ConfigError, DataError, UserError
from aria_train.eval.probes import check_experts
from aria_train.stages.stage import Stage, model_differences, stored_config
from aria_train.train.state import check_resumable


@dataclass
class Report:
    """What was found; every entry is a sentence that begins with its stage."""

    problems: list[str] = field(default_factory=list)
    """What contradicts itself: cannot work, whatever is added."""
    absent: list[str] = field(default_factory=list)
    """What is not there, or not readable, or made for another model: corpora, tokenizers, weights."""
    notes: list[str] = field(default_factory=list)
    """What works, and should be known."""


def check(stages: Sequence[Stage]) -> Report:
    """All checks but the number of ranks."""
    report = Report()
    descriptions = [_open_corpora(stage, report) for stage in stages]
    _check_tokenizers(stages, descriptions, report)
    for stage in stages:
        report.absent += [f"{stage.name}: {sentence}" for sentence in _absent_weights(stage, stage is stages[0])]
        report.notes += [f"{stage.name}: {sentence}" for sentence in (*stage.config.doubts(), *_rope_notes(stage))]
        report.problems += [f"{stage.name}: {sentence}" for sentence in _evaluations(stage)]
    for before, stage in itertools.pairwise(stages):
        report.problems += [f"{stage.name}: {sentence}" for sentence in _hand_over(before, stage)]
        report.notes += [f"{stage.name}: {sentence}" for sentence in _context_notes(before, stage)]
    for index, stage in enumerate(stages):
        longest = max(earlier.config.train.context_length for earlier in stages[: index + 1])
        for sentence, broken in _samples_left_out(stage, descriptions[index], longest):
            (report.problems if broken else report.notes).append(f"{stage.name}: {sentence}")
    report.problems += _first_start(stages[0])
    report.problems += _progress(stages)
    return report


def check_ranks(stages: Sequence[Stage]) -> Iterator[str]:
    """Stages that cannot be laid out on the ranks there are."""
    for stage in stages:
        try:
            check_world(stage.config, int(os.environ.get("WORLD_SIZE", "1")))
        except ConfigError as error:
            yield f"{stage.name}: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# From stage to stage


def _hand_over(before: Stage, stage: Stage) -> Iterator[str]:
    """What `stage` cannot take over from `before`."""
    old, new = before.config, stage.config
    differences = "; ".join(model_differences(old.model, new.model))
    if differences:
        yield (
            f"{differences}. It starts from the weights of {before.name}, so it must be the same model; a stage may "
            "change model.rope_base and model.max_positions, and add model.vision."
        )
    if new.model.vision is not None and old.model.vision is None:
        sourced = {*new.checkpoint.init_fresh, *(["vision"] if new.checkpoint.init_vision_from else [])}
        lacking = sorted({"vision", "projector"} - sourced)
        if lacking:
            yield (
                f"{before.name} has no {' and no '.join(lacking)} to hand over. Name what they start from: "
                f"checkpoint.init_fresh: [{', '.join(lacking)}] for random values"
                + (", or checkpoint.init_vision_from for a SigLIP encoder." if "vision" in lacking else ".")
            )
    if new.model.rope_base < old.model.rope_base:
        yield (
            f"model.rope_base falls from {old.model.rope_base:,.0f} ({before.name}) to {new.model.rope_base:,.0f}: "
            "positions that the weights know would turn faster. Keep the base, or raise it."
        )


def _context_notes(before: Stage, stage: Stage) -> Iterator[str]:
    old, new = before.config, stage.config
    growth = new.train.context_length / old.train.context_length
    if growth > 1 and new.model.rope_base == old.model.rope_base:
        yield f"the context grows {growth:g} times and model.rope_base stays {new.model.rope_base:,.0f}"
    start = new.schedule.rope_from
    if start is not None and start != old.model.rope_base:
        yield f"schedule.rope_from is {start:,.0f}, but {before.name} ends with base {old.model.rope_base:,.0f}"


def _rope_notes(stage: Stage) -> Iterator[str]:
    model, context = stage.config.model, stage.config.train.context_length
    slowest = 2 * math.pi * model.rope_base ** ((model.head_dim - 2) / model.head_dim)
    if slowest < context:
        yield (
            f"with model.rope_base {model.rope_base:,.0f} the slowest rotation repeats after {slowest:,.0f} tokens, "
            f"within the context of {context:,}"
        )


def _evaluations(stage: Stage) -> Iterator[str]:
    """Evaluations that a stage asks for and its model cannot have."""
    if stage.config.evaluation.experts and not stage.is_finished:
        try:
            check_experts(stage.config)
        except ConfigError as error:
            yield str(error)


def _first_start(first: Stage) -> Iterator[str]:
    """What is wrong with where the first stage starts from; a checkpoint that is not there is not said here."""
    settings = first.config.checkpoint
    if settings.init_from is None:
        if settings.init_optimizer:
            yield f"{first.name}: checkpoint.init_optimizer is true, but the first stage has no checkpoint.init_from."
        return
    try:
        differences = "; ".join(model_differences(stored_config(settings.init_from).model, first.config.model))
    except CheckpointError:
        return
    if differences:
        yield f"{first.name}: checkpoint.init_from {settings.init_from} holds another model: {differences}."


def _progress(stages: Sequence[Stage]) -> Iterator[str]:
    """Run directories whose state does not fit the order of the stages, or their configuration."""
    unfinished: Stage | None = None
    for stage in stages:
        newest = stage.newest_checkpoint()
        if newest is not None:
            try:
                check_resumable(stage.config, {}, {}, newest)
            except CheckpointError as error:
                yield f"{stage.name}: {error}"
            if unfinished is not None:
                yield (
                    f"{stage.name}: {stage.run_dir} has begun already, from weights of {unfinished.name} before its "
                    f"last step ({unfinished.steps_done()} of {unfinished.config.total_steps} are done). Move it away, "
                    f"or set the length of {unfinished.name} back to what it was."
                )
        if unfinished is None and (newest is None or newest.step < stage.config.total_steps):
            unfinished = stage


def _absent_weights(stage: Stage, is_first: bool) -> Iterator[str]:
    settings = stage.config.checkpoint
    if is_first and settings.init_from is not None:
        try:
            stored_config(settings.init_from)
        except CheckpointError as error:
            yield f"checkpoint.init_from: {error}"
    if settings.init_vision_from is not None and not Path(settings.init_vision_from).is_dir():
        yield f"checkpoint.init_vision_from: {settings.init_vision_from}: no such folder."


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class _Corpus:
    """What a corpus says about itself."""

    source: str
    path: str
    tokenizer: str | None = None
    """SHA-256 of the tokenizer it was prepared with."""
    longest_whole: int = 0
    """Tokens of its longest sample, where samples are not cut."""


def _open_corpora(stage: Stage, report: Report) -> list[_Corpus]:
    """The corpora of a stage as far as they can be opened; the others go to the report."""
    if not stage.config.data.train:
        report.problems.append(f"{stage.name}: data.train names no source.")
    found: dict[str, _Corpus] = {}
    lacking: dict[str, str] = {}
    for source in [*stage.config.data.train, *stage.config.data.validation]:
        key = json.dumps([source.path, source.min_tokens, source.max_tokens, source.concatenate])
        if key in found:
            continue
        try:
            found[key] = _open_corpus(source, stage)
        except DataError as error:
            found[key] = _Corpus(source.name, str(source.path))
            sentence = f"{stage.name}: source {source.name!r}: {error}"
            if _exists(source):
                report.absent.append(sentence)
            else:
                lacking.setdefault(str(source.path), sentence)
    if len(lacking) > 2:
        report.absent.append(
            f"{stage.name}: {len(lacking)} corpora do not exist: {', '.join(lacking)}. Make them with "
            "`aria-train data prepare`, or give the paths they have."
        )
    else:
        report.absent += lacking.values()
    return list(found.values())


def _exists(source: SourceConfig) -> bool:
    paths = [source.path] if isinstance(source.path, str) else source.path
    return all(Path(path).is_dir() or Path(strip_suffix(path) + ".idx").exists() for path in paths)


def _open_corpus(source: SourceConfig, stage: Stage) -> _Corpus:
    """Raises DataError where a corpus is missing, damaged, or made for another model."""
    model = stage.config.model
    paths = [source.path] if isinstance(source.path, str) else source.path
    if len(paths) == 1 and (Path(paths[0]) / META).is_file():
        train = stage.config.train
        reader = open_reader(source, Path(paths[0]), train.context_length, train.seed)
        multimodal.check_fits(reader, model)
        whole = 0 if reader.meta["divisible"] else reader.meta["longest_sample"]
        return _Corpus(source.name, paths[0], reader.meta.get("tokenizer_sha256"), whole)
    hashes = set()
    for prefix in text.find_prefixes(paths):
        text.check_fits(IndexedCorpus(prefix), model)
        hashes.add(read_metadata(prefix).get("tokenizer_sha256"))
    return _Corpus(source.name, ", ".join(paths), next(iter(hashes)) if len(hashes) == 1 else None)


def _check_tokenizers(stages: Sequence[Stage], descriptions: Sequence[list[_Corpus]], report: Report) -> None:
    """One vocabulary for all stages: whatever says which tokenizer made it must say the same one."""
    made_with: dict[str, list[str]] = {}
    lacking: set[str] = set()
    for stage, corpora in zip(stages, descriptions, strict=True):
        folder = stage.config.data.tokenizer
        if folder is not None and folder not in lacking:
            try:
                made_with.setdefault(tokenizer.tokenizer_hash(folder), []).append(f"{stage.name}: {folder}")
            except UserError as error:
                lacking.add(folder)
                report.absent.append(f"{stage.name}: data.tokenizer: {error}")
        for corpus in corpora:
            if corpus.tokenizer is not None:
                made_with.setdefault(corpus.tokenizer, []).append(f"{stage.name}: source {corpus.source!r}")
    if len(made_with) > 1:
        kinds = " | ".join(", ".join(dict.fromkeys(places)) for places in made_with.values())
        report.problems.append(
            f"{stages[0].name} and others: not one tokenizer but {len(made_with)}, under which the same token ids mean "
            f"different text: {kinds}. Prepare the corpora with the same tokenizer."
        )


def _samples_left_out(stage: Stage, corpora: Sequence[_Corpus], longest_context: int) -> Iterator[tuple[str, bool]]:
    """Corpora with samples longer than the window, which are not cut; and whether an earlier stage could hold them."""
    context = stage.config.train.context_length
    for corpus in corpora:
        positions = corpus.longest_whole - 1
        if positions <= context:
            continue
        sentence = (
            f"source {corpus.source!r}: {corpus.path} has samples of up to {corpus.longest_whole:,} tokens, which are "
            f"not cut, and train.context_length is {context:,}"
        )
        if context < longest_context:
            yield (
                f"{sentence}, down from {longest_context:,}. Keep the longer context, or prepare a corpus of shorter "
                "samples.",
                True,
            )
        else:
            yield f"{sentence}: longer ones are left out", False
