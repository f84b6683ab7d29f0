"""`aria-train data inspect` on a multimodal corpus: what it holds, how it packs, and a sample as the model reads it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aria_train.data.multimodal import images
from aria_train.data.multimodal.corpus import plan_samples
from aria_train.data.multimodal.images import BadImage
from aria_train.data.multimodal.store import Reader, Sample
from aria_train.data.prepare.inspection import length_histogram
from aria_train.data.text import tokenizer as tokenizers_
from aria_train.errors import DataError

_SHOWN_CHARACTERS = 2000


def inspect(args: argparse.Namespace) -> None:
    """Describes the folder `args.path`."""
    console, reader = Console(), Reader(Path(args.path))
    if not 0 <= args.document < len(reader):
        raise DataError(f"--document {args.document}: {reader.folder} has samples 0 to {len(reader) - 1}.")
    _describe(console, reader, args.context_length)
    sample = reader.sample(args.document)
    console.print(f"[bold]sample {args.document}[/bold], from {escape(sample.origin)}, {len(sample.token_ids)} tokens:")
    _show_images(console, sample)
    _show_text(console, sample, args.tokenizer or str(reader.meta.get("tokenizer", "")))


def _describe(console: Console, reader: Reader, context_length: int) -> None:
    meta, plan = reader.meta, plan_samples(reader, context_length, seed=0)
    left_out = len(reader) - int((plan.pieces == 0).sum())
    facts = Table(show_header=False, title=str(reader.folder), title_justify="left")
    for name in ("samples", "images", "tokens", "image_tokens", "targets"):
        facts.add_row(name.replace("_", " "), f"{meta[name]:,}")
    facts.add_row(f"windows of {context_length:,}", f"{plan.stats.windows:,}, {plan.stats.efficiency:.2%} full")
    facts.add_row("longer than a window", f"{plan.stats.cut:,} cut into pieces, {left_out:,} left out")
    for name, count in meta["categories"].items():
        facts.add_row(f"category {escape(name)}", f"{count:,}")
    for name in ("format", "loss", "image_sizes", "image_size", "split_unit", "tokenizer", "holdout_fraction"):
        if meta.get(name) is not None:
            facts.add_row(f"{name} (as prepared)", escape(str(meta[name])))
    console.print(facts)
    console.print(length_histogram(reader.lengths().astype(np.int64)))


def _show_images(console: Console, sample: Sample) -> None:
    for number, (data, placement) in enumerate(zip(sample.images, sample.placements, strict=True), 1):
        try:
            width, height = images.read_size(data)
            size = f"{width} x {height}"
        except BadImage as error:
            size = str(error)
        crops = f" in {placement.layout.num_crops} crops" if placement.layout.grid else ""
        tokens = f"class {placement.layout.size}{crops}, {placement.layout.num_tokens} tokens"
        console.print(f"  image {number}: {size}, {len(data):,} bytes; {tokens}", markup=False, highlight=False)


def _show_text(console: Console, sample: Sample, folder: str) -> None:
    """What is learned is shown in bold, image tokens by their number."""
    if not folder or not Path(folder).is_dir():
        console.print(" ".join(map(str, sample.token_ids[:200])))
        console.print("(ids; --tokenizer FOLDER decodes them)", style="dim")
        return
    tokenizer = tokenizers_.load_tokenizer(folder)
    shown, start = "", 0
    while start < len(sample.token_ids) and len(shown) < _SHOWN_CHARACTERS:
        end = start
        while end < len(sample.token_ids) and sample.loss[end] == sample.loss[start]:
            end += 1
        text = tokenizer.decode(sample.token_ids[start:end].tolist(), skip_special_tokens=False)
        text = escape(re.sub(r"(?:<\|img\|>)+", lambda run: f"<|img|> x {run.group().count('<|img|>')}", text))
        shown, start = shown + (f"[bold]{text}[/bold]" if sample.loss[start] else text), end
    console.print(shown, highlight=False)
    console.print("(bold: targets of the loss)", style="dim")
