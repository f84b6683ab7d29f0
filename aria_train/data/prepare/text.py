"""From documents to a text corpus: `PREFIX.bin`, `PREFIX.idx`, and `PREFIX.json` that says what it is.

Processes tokenize units of the input into small corpora in a hidden folder; the parent appends these in the order of
the input, so the result does not depend on the number of processes, and publishes the whole by renaming.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aria_train.data.prepare.skips import EXAMPLES_PER_REASON, SkipReport, refuse_empty
from aria_train.data.prepare.text_inputs import (
    LinesRead,
    Skipped,
    Unit,
    find_inputs,
    read_documents,
    size_of,
    split_into_units,
)
from aria_train.data.prepare.workers import in_order, worker_pool
from aria_train.data.text import tokenizer as tokenizers_
from aria_train.data.text.indexed import (
    IndexedCorpus,
    IndexedWriter,
    is_index_file,
    publish_files,
    read_metadata,
    strip_suffix,
    token_dtype,
)
from aria_train.errors import DataError
from aria_train.machine import num_cpus
from aria_train.publish import workplace_beside

_LARGEST_UNIT, _SMALLEST_UNIT, _UNITS_PER_PROCESS = 64 << 20, 1 << 20, 8
_BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Job:
    """What every process needs to know to tokenize a unit."""

    tokenizer: str
    text_key: str
    holdout_fraction: float

    @property
    def parts(self) -> tuple[str, ...]:
        """Suffixes of the corpora that are made."""
        return ("", "_validation") if self.holdout_fraction else ("",)


@dataclass
class UnitReport:
    """What became of one unit."""

    characters: int = 0
    lines: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    """At most EXAMPLES_PER_REASON of each reason; `counts` has them all."""
    counts: collections.Counter[str] = field(default_factory=collections.Counter)


def prepare(args: argparse.Namespace) -> None:
    """`aria-train data prepare --format text`; see `commands` for the arguments."""
    prefix = strip_suffix(args.output)
    job = Job(args.tokenizer, args.text_key, args.holdout_fraction)
    if os.path.basename(prefix) in ("", ".", ".."):
        better = os.path.join(prefix, "train")
        raise DataError(f"{args.output}: not a prefix of file names. Give one, such as {better}.")
    for suffix in job.parts:
        _refuse_existing(prefix + suffix, args.overwrite)
    if not job.holdout_fraction:
        _refuse_stale_holdout(prefix)
    prepare_text(prefix, find_inputs(args.inputs, args.glob), job, args.processes or num_cpus())


def _refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raises DataError if a file of the corpus exists, unless it may be overwritten and belongs to one."""
    index, tokens, description = (Path(prefix + end) for end in (".idx", ".bin", ".json"))
    found = [path for path in (index, tokens, description) if os.path.lexists(path)]
    if found and not overwrite:
        raise DataError(f"{found[0]}: exists already. Choose another prefix, or give --overwrite.")
    is_ours = read_metadata(prefix).get("kind") == "text"
    is_index = is_index_file(index)
    foreign = {index: not is_index, tokens: not (is_ours or is_index), description: not is_ours}
    for path in found:
        if foreign[path] or not path.is_file():
            raise DataError(
                f"{path}: is no part of a text corpus. --overwrite replaces a corpus and nothing else. Choose another "
                "prefix, or move it away."
            )


def _refuse_stale_holdout(prefix: str) -> None:
    """Without a hold-out, documents that an earlier preparation held out would be trained on."""
    if read_metadata(f"{prefix}_validation").get("part") == "validation":
        raise DataError(
            f"{prefix}_validation: was held out of {prefix} by an earlier preparation; without --holdout-fraction its "
            "documents would be trained on. Give the same --holdout-fraction, or remove the files "
            f"{prefix}_validation.*."
        )


def prepare_text(prefix: str, paths: Sequence[str], job: Job, processes: int) -> dict[str, dict[str, Any]]:
    """Makes the corpora `prefix` and, with a hold-out, `prefix + "_validation"`; returns their metadata by suffix."""
    from aria_train.data.prepare.report import Progress, print_report

    tokenizer = tokenizers_.load_tokenizer(job.tokenizer)
    tokenizers_.end_of_document_id(job.tokenizer, tokenizer)
    dtype = token_dtype(tokenizers_.vocabulary_size(tokenizer))
    total = sum(size_of(path) for path in paths)
    unit_bytes = min(max(total // (processes * _UNITS_PER_PROCESS), _SMALLEST_UNIT), _LARGEST_UNIT)
    units = split_into_units(paths, unit_bytes)
    skips, characters = SkipReport(), 0
    with workplace_beside(Path(prefix)) as workplace, Progress(sum(unit.num_bytes for unit in units)) as progress:
        writers = {suffix: IndexedWriter(workplace / f"whole{suffix}", dtype) for suffix in job.parts}
        lines_before: collections.Counter[str] = collections.Counter()
        with contextlib.closing(_tokenize_all(units, job, workplace, processes)) as reports:
            for number, (unit, report) in enumerate(reports):
                for suffix, writer in writers.items():
                    _move_part(workplace / f"{number}{suffix}", writer)
                _add_report(skips, unit, report, lines_before)
                characters += report.characters
                progress.advance(unit.num_bytes, sum(writer.num_documents for writer in writers.values()))
        counts = {suffix: writer.num_documents for suffix, writer in writers.items()}
        refuse_empty(counts, "document", paths, skips, job.holdout_fraction)
        metadata = {
            suffix: _metadata(writer, suffix, job, tokenizer, paths, skips) for suffix, writer in writers.items()
        }
        _publish(workplace, prefix, writers, metadata)
    print_report(prefix, metadata, skips, characters)
    return metadata


def _metadata(
    writer: IndexedWriter, suffix: str, job: Job, tokenizer: Any, paths: Sequence[str], skips: SkipReport
) -> dict[str, Any]:
    return {
        "kind": "text",
        "tokenizer": os.path.abspath(job.tokenizer),
        "tokenizer_sha256": tokenizers_.tokenizer_hash(job.tokenizer),
        "vocabulary_size": tokenizers_.vocabulary_size(tokenizer),
        "end_of_document_id": tokenizers_.end_of_document_id(job.tokenizer, tokenizer),
        "dtype": writer.dtype.name,
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "part": "validation" if suffix else "train",
        "holdout_fraction": job.holdout_fraction,
        "files": len(paths),
        "skipped": skips.as_json(),
    }


def _publish(
    workplace: Path, prefix: str, writers: dict[str, IndexedWriter], metadata: dict[str, dict[str, Any]]
) -> None:
    renames = {}
    for suffix, writer in writers.items():
        writer.finish()
        whole = str(workplace / f"whole{suffix}")
        Path(whole + ".json").write_text(json.dumps(metadata[suffix], indent=2) + "\n", encoding="utf-8")
        renames.update({whole + end: prefix + suffix + end for end in (".bin", ".json", ".idx")})
    publish_files(renames)


def _move_part(part: Path, writer: IndexedWriter) -> None:
    writer.add_corpus(IndexedCorpus(part))
    for end in (".bin", ".idx"):
        Path(f"{part}{end}").unlink()


def _add_report(skips: SkipReport, unit: Unit, report: UnitReport, lines_before: collections.Counter[str]) -> None:
    """Adds a unit's skips, with lines counted from the beginning of the file; units come in order."""
    known = collections.Counter(skipped.reason for skipped in report.skipped)
    before = lines_before[unit.paths[0]] if unit.kind == "jsonl" else 0
    for skipped in report.skipped:
        skips.add(skipped, before)
    skips.counts.update(report.counts - known)
    lines_before[unit.paths[0]] += report.lines


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def _tokenize_all(
    units: Sequence[Unit], job: Job, workplace: Path, processes: int
) -> Generator[tuple[Unit, UnitReport], None, None]:
    """Reports of the units, in order, whatever process did them; their parts lie in the workplace by then."""
    context = multiprocessing.get_context("spawn")
    # Without a lock, which a worker that is killed would keep for ever.
    stop = context.RawValue(ctypes.c_bool, False)
    if processes == 1 or len(units) == 1:
        _start_worker(job, workplace, stop)
        for number, unit in enumerate(units):
            yield unit, _tokenize_unit(number, unit)
        return

    def problem(_unit: object) -> str:
        return (
            "a worker process ended unexpectedly, usually because memory ran out; nothing was written. Use fewer "
            "--processes, or split very long documents."
        )

    processes = min(processes, len(units))
    with worker_pool(processes, _start_worker, job, workplace, stop) as pool:
        try:
            for (_, unit), report in in_order(pool, _tokenize_numbered, enumerate(units), 2 * processes, problem):
                yield unit, report
        finally:
            stop.value = True  # An interruption does not wait for whole units.


class _Worker:
    """What a process keeps between units."""

    job: Job
    workplace: Path
    stop: ctypes.c_bool
    tokenizer: Any
    end_of_document: int
    dtype: np.dtype


_worker = _Worker()


def _start_worker(job: Job, workplace: Path, stop: ctypes.c_bool) -> None:
    _worker.job, _worker.workplace, _worker.stop = job, workplace, stop
    _worker.tokenizer = tokenizers_.load_tokenizer(job.tokenizer)
    # Text that spells a special token, such as <|endoftext|>, is text: data must not be able to forge boundaries.
    _worker.tokenizer.encode_special_tokens = True
    _worker.end_of_document = tokenizers_.end_of_document_id(job.tokenizer, _worker.tokenizer)
    _worker.dtype = token_dtype(tokenizers_.vocabulary_size(_worker.tokenizer))


def _tokenize_numbered(numbered: tuple[int, Unit]) -> UnitReport:
    return _tokenize_unit(*numbered)


def _tokenize_unit(number: int, unit: Unit) -> UnitReport:
    """Writes the corpora `workplace/NUMBER{part}` from a unit."""
    job, report = _worker.job, UnitReport()
    writers = {suffix: IndexedWriter(_worker.workplace / f"{number}{suffix}", _worker.dtype) for suffix in job.parts}
    for batch in _batches(read_documents(unit, job.text_key), report):
        if _worker.stop.value:
            break
        encodings = _worker.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            suffix = "_validation" if is_held_out(text, job.holdout_fraction) else ""
            writers[suffix].add_document(np.array([*encoding.ids, _worker.end_of_document], np.int64))
    for writer in writers.values():
        writer.finish()
    return report


def _batches(items: Iterator[str | Skipped | LinesRead], report: UnitReport) -> Iterator[list[str]]:
    """The documents among `items`, several at a time; the rest goes into the report."""
    batch: list[str] = []
    characters = 0
    for item in items:
        if isinstance(item, str):
            batch.append(item)
            characters += len(item)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                report.characters += characters
                batch, characters = [], 0
        elif isinstance(item, LinesRead):
            report.lines = item.count
        else:
            report.counts[item.reason] += 1
            if report.counts[item.reason] <= EXAMPLES_PER_REASON:
                report.skipped.append(item)
    if batch:
        yield batch
        report.characters += characters


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation part: decided by its own hash, so copies of it go the same way."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
