"""`aria-train data concatenate`: a corpus of long multimodal sequences out of one of captioned images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from aria_train.data.multimodal.store import FILES, Reader, Writer
from aria_train.data.views import ConcatenatedReader
from aria_train.errors import DataError
from aria_train.publish import replacing

_COUNTED = {
    "samples", "tokens", "targets", "images", "image_tokens", "longest_sample", "largest_token_id", "categories",
    "fingerprint", "files", "kind", "version",
}  # fmt: skip
"""What the writer counts itself."""


def concatenate(args: argparse.Namespace) -> None:
    """Joins `args.samples` captioned images per sequence, or as many as fit `args.context_length` tokens."""
    if args.context_length < 1 or (args.samples is not None and args.samples < 1):
        raise DataError("data concatenate: --samples and --context-length must be 1 or more.")
    meta = concatenate_corpus(
        Path(args.output), Path(args.corpus), args.samples, args.context_length, args.seed, args.overwrite
    )
    print(
        f"{args.output}: {meta['samples']:,} sequences of up to {meta['longest_sample']:,} tokens, {meta['images']:,} "
        f"images, {meta['tokens']:,} tokens"
    )


def concatenate_corpus(
    output: Path, corpus: Path, samples: int | None, context_length: int, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the folder `output`, and returns its metadata. Raises DataError if `corpus` has no captioned images."""
    source = Reader(corpus)
    joined = ConcatenatedReader(source, "window" if samples is None else samples, context_length, seed)
    with replacing(output, overwrite, "corpus", FILES) as folder, Writer(folder) as writer:
        for row in track(range(len(joined)), "joining", console=Console(stderr=True), transient=True):
            writer.add(joined.sample(row))
        details = {key: value for key, value in source.meta.items() if key not in _COUNTED}
        return writer.close(**{**details, "format": "long", "divisible": False})
