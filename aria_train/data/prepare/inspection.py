"""`aria-train data inspect`: what a corpus holds and how it packs."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from aria_train.config.sections import MAX_CONTEXT
from aria_train.data.packing import plan_documents
from aria_train.data.text import tokenizer as tokenizers_
from aria_train.data.text.corpus import find_prefixes
from aria_train.data.text.indexed import IndexedCorpus, read_metadata
from aria_train.errors import DataError

_BAR = 20
_SAMPLE_TOKENS = 120


def inspect(args: argparse.Namespace) -> None:
    """Describes every corpus at `args.path`."""
    if not 1 <= args.context_length <= MAX_CONTEXT:
        raise DataError(f"--context-length {args.context_length}: must be 1 or more, and at most {MAX_CONTEXT}.")
    if (Path(args.path) / "meta.json").is_file():
        from aria_train.data.prepare import multimodal_inspection

        return multimodal_inspection.inspect(args)
    console = Console()
    for prefix in find_prefixes([args.path]):
        corpus = IndexedCorpus(prefix)
        corpus.verify()
        _describe(console, corpus, args.context_length)
        _show_document(console, corpus, args.document, args.tokenizer)


def _describe(console: Console, corpus: IndexedCorpus, context_length: int) -> None:
    lengths = corpus.document_lengths()
    stats = plan_documents(lengths, context_length, seed=0).stats
    console.print(corpus.prefix, style="bold", markup=False, highlight=False, soft_wrap=True)
    facts = Table("", Column(overflow="fold"), show_header=False)
    facts.add_row("documents", f"{corpus.num_documents:,}")
    facts.add_row("of them without a target", f"{stats.without_targets:,} (fewer than two tokens)")
    facts.add_row("sequences", f"{corpus.num_sequences:,}")
    facts.add_row("tokens", f"{corpus.num_tokens:,} as {corpus.dtype.name}")
    facts.add_row(f"windows of {context_length:,}", f"{stats.windows:,}, {stats.efficiency:.2%} full")
    facts.add_row("longer than a window", f"{stats.cut:,} documents, cut into pieces")
    for key, value in read_metadata(corpus.prefix).items():
        if key != "skipped":
            facts.add_row(f"{key} (as prepared)", escape(str(value)))
    console.print(facts)
    if len(lengths):
        console.print(length_histogram(lengths))


def length_histogram(lengths: NDArray[np.int64]) -> Table:
    """Documents by length, in powers of two."""
    table = Table("tokens per document", "documents", "share of tokens", "", title="lengths", title_justify="left")
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    documents = np.bincount(powers)
    tokens = np.bincount(powers, weights=lengths)
    for power in np.flatnonzero(documents).tolist():
        bar = "█" * round(_BAR * documents[power] / documents.max())
        share = tokens[power] / max(tokens.sum(), 1)
        table.add_row(f"up to {2**power:,}", f"{documents[power]:,}", f"{share:.1%}", bar)
    table.add_row("mean", f"{lengths.mean():,.1f}", "", f"median {np.median(lengths):,.0f}, longest {lengths.max():,}")
    return table


def _show_document(console: Console, corpus: IndexedCorpus, document: int, folder: str | None) -> None:
    if not corpus.num_documents:
        return
    if not 0 <= document < corpus.num_documents:
        raise DataError(f"--document {document}: {corpus.prefix} has documents 0 to {corpus.num_documents - 1}.")
    tokens = corpus.read(document, 0, _SAMPLE_TOKENS).tolist()
    folder = folder or str(read_metadata(corpus.prefix).get("tokenizer", ""))
    console.print(f"[bold]document {document}[/bold], its first {len(tokens)} tokens:")
    if not folder or not Path(folder).is_dir():
        console.print(" ".join(map(str, tokens)))
        console.print("(ids; --tokenizer FOLDER decodes them)", style="dim")
        return
    console.print(tokenizers_.load_tokenizer(folder).decode(tokens, skip_special_tokens=False), markup=False)
