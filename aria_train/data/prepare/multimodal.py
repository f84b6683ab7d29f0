"""From conversations, documents and captioned images to a multimodal corpus: `aria-train data prepare --format ...`.

Processes turn units of the input into samples; the parent writes them in the order of the input, so the result does
not depend on the number of processes, and publishes the whole folder by renaming. What is skipped is listed, with its
place and reason, in `skipped.jsonl` of the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aria_train.config import load_config
from aria_train.data.multimodal.formats import BadRecord, Encoder, Recipe
from aria_train.data.multimodal.store import FILES, Sample, Writer
from aria_train.data.prepare import multimodal_inputs
from aria_train.data.prepare.multimodal_inputs import Unit, read_records
from aria_train.data.prepare.skips import SkipReport, refuse_empty
from aria_train.data.prepare.text_inputs import Skipped, find_inputs, printable, size_of
from aria_train.data.prepare.workers import in_order, worker_pool
from aria_train.data.text import tokenizer
from aria_train.errors import DataError
from aria_train.machine import num_cpus
from aria_train.publish import replacing


def prepare(args: argparse.Namespace) -> None:
    """`aria-train data prepare --format chat|interleaved|captions`; see `commands` for the arguments."""
    recipe = make_recipe(args)
    paths = find_inputs(args.inputs, args.glob or multimodal_inputs.GLOBS)
    processes = args.processes or num_cpus()
    prepare_multimodal(Path(args.output), paths, recipe, processes, args.holdout_fraction, args.overwrite)


def make_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the command's arguments describe. Raises DataError where they do not fit the model."""
    if args.model_config is None:
        raise DataError(
            f"--format {args.format} needs --model-config: the stage's YAML, whose model.vision says how many tokens "
            "an image becomes."
        )
    model = load_config(args.model_config).model
    sizes = sorted(model.vision.image_sizes) if model.vision else []
    for option, size in (("--image-size", args.image_size), ("--split-images", args.split_images)):
        if size is not None and size not in sizes:
            raise DataError(f"{option} {size}: must be one of model.vision.image_sizes, which are {sizes}.")
    return Recipe(
        tokenizer=args.tokenizer,
        model=model,
        format=args.format,
        loss=args.loss or ("assistant" if args.format == "chat" else "text"),
        image_size=args.image_size,
        split_unit=args.split_images,
        check_images=args.check_images,
        image_root=args.image_root,
        image_key=args.image_key,
        text_key=args.text_key,
        question_key=args.question_key,
        answer_key=args.answer_key,
    )


def prepare_multimodal(
    output: Path,
    paths: Sequence[str],
    recipe: Recipe,
    processes: int = 1,
    holdout_fraction: float = 0.0,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Makes the folder `output` and, with a hold-out, `output_validation`; returns their metadata by suffix."""
    from aria_train.data.prepare.report import Progress

    Encoder(recipe)  # what is wrong with the tokenizer is said before any process starts
    suffixes = ("", "_validation") if holdout_fraction else ("",)
    total = sum(size_of(path) for path in paths)
    skips = SkipReport()
    with contextlib.ExitStack() as stack:
        targets = {suffix: Path(f"{output}{suffix}") for suffix in suffixes}
        # First entered is last published: a training part that is there says that all is.
        folders = {s: stack.enter_context(replacing(targets[s], overwrite, "corpus", FILES)) for s in suffixes}
        writers = {suffix: stack.enter_context(Writer(folders[suffix])) for suffix in suffixes}
        skipped_file = stack.enter_context(open(folders[""] / "skipped.jsonl", "w", encoding="utf-8"))
        progress = stack.enter_context(Progress(total, "preparing"))
        for unit, result in _encode_all(paths, recipe, processes):
            for sample in result.samples:
                held_out = bool(holdout_fraction) and is_held_out(sample, holdout_fraction)
                writers["_validation" if held_out else ""].add(sample)
            for skipped in result.skipped:
                skips.add(skipped)
                skipped_file.write(_as_line(skipped))
            progress.advance(unit.num_bytes, sum(writer.samples for writer in writers.values()))
        counts = {suffix: writer.samples for suffix, writer in writers.items()}
        refuse_empty(counts, "sample", paths, skips, holdout_fraction)
        common = _common_metadata(recipe, holdout_fraction, skips)
        metadata = {
            suffix: writer.close(**common, part="validation" if suffix else "train")
            for suffix, writer in writers.items()
        }
    _print_report({targets[suffix]: meta for suffix, meta in metadata.items()}, skips, targets[""])
    return metadata


def is_held_out(sample: Sample, fraction: float) -> bool:
    """Whether a sample belongs to the validation part: decided by its own content, so copies go the same way."""
    digest = hashlib.blake2b(sample.token_ids.tobytes(), digest_size=8)
    for image in sample.images:
        digest.update(image)
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def _common_metadata(recipe: Recipe, holdout_fraction: float, skips: SkipReport) -> dict[str, Any]:
    vision = recipe.model.vision
    return {
        "format": recipe.format,
        "loss": recipe.loss,
        "divisible": recipe.format != "chat",
        "tokenizer": str(recipe.tokenizer),
        "tokenizer_sha256": tokenizer.tokenizer_hash(recipe.tokenizer),
        "vocabulary_size": tokenizer.vocabulary_size(tokenizer.load_tokenizer(recipe.tokenizer)),
        "newline_ids": tokenizer.load_tokenizer(recipe.tokenizer).encode("\n", add_special_tokens=False).ids,
        "image_token_id": recipe.model.image_token_id,
        "image_sizes": {str(size): queries for size, queries in vision.image_sizes.items()} if vision else {},
        "image_size": recipe.image_size,
        "split_unit": recipe.split_unit,
        "holdout_fraction": holdout_fraction,
        "skipped": skips.as_json(),
    }


def _as_line(skipped: Skipped) -> str:
    entry = {"path": printable(skipped.path), "line": skipped.line, "reason": skipped.reason, "detail": skipped.detail}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _print_report(metadata: dict[Path, dict[str, Any]], skips: SkipReport, output: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from aria_train.data.prepare.report import print_skipped

    console = Console()
    columns = ("samples", "images", "tokens", "image_tokens", "targets", "longest_sample")
    names = [name.replace("_", " ") for name in columns]
    made = Table(Column("corpus", overflow="fold"), *names, title="prepared", title_justify="left")
    for path, meta in metadata.items():
        made.add_row(str(path), *(f"{meta[name]:,}" for name in columns))
    console.print(made)
    print_skipped(console, skips)
    if skips.counts:
        console.print(f"all of them: {output / 'skipped.jsonl'}")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class UnitResult:
    """What became of one unit, in order."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def _encode_all(paths: Sequence[str], recipe: Recipe, processes: int) -> Iterator[tuple[Unit, UnitResult]]:
    """Results of the units, in order, whatever process did them."""
    units = multimodal_inputs.split_into_units(paths)
    first = list(itertools.islice(units, processes))
    units = itertools.chain(first, units)
    processes = len(first)  # no more than there is work for
    if processes <= 1:
        encoder = Encoder(recipe)
        yield from ((unit, encode_unit(unit, encoder)) for unit in units)
        return

    def problem(unit: Unit) -> str:
        return (
            "a worker process ended unexpectedly, because memory ran out or a file crashed its decoder; nothing was "
            f"written. It was at or shortly after {unit.path}:{unit.first}. Use fewer --processes, or take it out."
        )

    with worker_pool(processes, _start_worker, recipe) as pool:
        yield from in_order(pool, _work, units, 2 * processes, problem)


def encode_unit(unit: Unit, encoder: Encoder) -> UnitResult:
    """The samples of a unit, and what was skipped."""
    result = UnitResult()
    for item in read_records(unit, encoder.recipe.columns):
        if isinstance(item, Skipped):
            result.skipped.append(item)
            continue
        line, record = item
        try:
            result.samples.append(encoder.encode(record, f"{printable(unit.path)}:{line}"))
        except BadRecord as error:
            result.skipped.append(Skipped(error.reason, unit.path, line, error.detail))
    return result


_encoder: Encoder


def _start_worker(recipe: Recipe) -> None:
    global _encoder
    _encoder = Encoder(recipe)


def _work(unit: Unit) -> UnitResult:
    return encode_unit(unit, _encoder)
