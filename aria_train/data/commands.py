"""The `data` command: tokenizers, preparation, and a look into a corpus. Only argparse is imported until one runs."""

from __future__ import annotations

import argparse
from typing import Any

from aria_train.arguments import local_path


def register(subparsers: Any) -> None:
    """Adds `data` and its subcommands to the command line's `add_subparsers` object."""
    data = subparsers.add_parser(
        "data",
        help="prepare, inspect and describe corpora",
        description="Makes tokenizers and corpora, and looks into them.",
    )
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    _register_tokenizer(commands)
    _register_prepare(commands)
    _register_concatenate(commands)
    _register_needles(commands)
    _register_inspect(commands)


def _register_tokenizer(commands: Any) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer, or take over an existing one",
        description="Trains a byte-level BPE tokenizer on documents and writes it as a Hugging Face tokenizer folder, "
        "with Aria's special tokens at Aria's ids; or, with --from, checks and copies an existing folder.",
    )
    parser.add_argument("output", type=local_path, metavar="FOLDER", help="tokenizer folder to write")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or globs to train on")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens, 64 reserved ones included (%(default)s)")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="copy this Hugging Face tokenizer instead")
    parser.add_argument("--max-bytes", type=float, default=1e9, help="bytes of text to train on (%(default).0e)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    _add_reading_options(parser)
    parser.set_defaults(run=_tokenizer)


def _register_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn documents into a corpus",
        description="Turns documents into a corpus. Text (JSON lines, Parquet, or plain files) becomes a Megatron pair "
        "PREFIX.bin and PREFIX.idx with PREFIX.json describing it; the multimodal formats become a folder.",
    )
    parser.add_argument(
        "output", type=local_path, metavar="PREFIX", help="where the corpus goes: a prefix (text) or a folder (others)"
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or globs")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="Hugging Face tokenizer folder")
    parser.add_argument(
        "--format",
        choices=("text", "chat", "interleaved", "captions"),
        default="text",
        help="what the inputs hold (%(default)s); all but text may have images, in JSON lines, Parquet, or a data set "
        "saved as Arrow",
    )
    parser.add_argument(
        "--holdout-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents, chosen by their hash, that goes to PREFIX_validation instead",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one per CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    _add_reading_options(parser)
    _add_multimodal_options(parser)
    parser.set_defaults(run=_prepare)


def _add_multimodal_options(parser: Any) -> None:
    group = parser.add_argument_group("formats with images")
    group.add_argument(
        "--model-config", metavar="YAML", help="the stage's configuration: model.vision sizes the images"
    )
    group.add_argument(
        "--loss",
        choices=("assistant", "text"),
        help="what is learned: what the assistant says (default for chat), or all text (default for the others)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="size class of every image; a record's own image_size wins (default: the smallest class that holds it)",
    )
    group.add_argument(
        "--split-images",
        type=int,
        metavar="PIXELS",
        help="cut images beyond their size class into crops, on grids that are multiples of this size class",
    )
    group.add_argument(
        "--image-root", metavar="FOLDER", help="what image paths start from (default: the input's folder)"
    )
    group.add_argument("--image-key", default="image", metavar="KEY", help="image, if not `images` (%(default)s)")
    group.add_argument("--question-key", default="question", metavar="KEY", help="chat without messages (%(default)s)")
    group.add_argument("--answer-key", default="answer", metavar="KEY", help="chat without messages (%(default)s)")
    group.add_argument(
        "--no-image-check",
        dest="check_images",
        action="store_false",
        help="read the headers of images only; faster, but broken ones are found in training",
    )


def _add_reading_options(parser: Any) -> None:
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or Parquet column (%(default)s)")
    parser.add_argument(
        "--glob",
        action="append",
        metavar="PATTERN",
        help="which files of a folder are read, such as '*.py'; may be repeated (default: JSON lines, Parquet, "
        "*.txt and *.md)",
    )


def _register_concatenate(commands: Any) -> None:
    parser = commands.add_parser(
        "concatenate",
        help="join captioned images into long sequences",
        description="Makes long multimodal sequences out of a corpus of captioned images (--format captions): several "
        "images, then all their captions. A source with `concatenate` does the same while training.",
    )
    parser.add_argument("output", type=local_path, metavar="FOLDER", help="corpus to write")
    parser.add_argument("corpus", metavar="CORPUS", help="prepared folder of captioned images")
    parser.add_argument("--samples", type=int, metavar="N", help="images per sequence (default: as many as fit)")
    parser.add_argument(
        "--context-length", type=int, default=65536, metavar="N", help="tokens of a window (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images come together (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    parser.set_defaults(run=_concatenate)


def _register_needles(commands: Any) -> None:
    parser = commands.add_parser(
        "needles",
        help="write documents that hide facts in a corpus and ask for them",
        description="Writes documents, as JSON lines for `data prepare`, that hide facts in the text of a corpus and "
        "ask for them at their end: what `eval needle` tests, with names that it never asks for.",
    )
    parser.add_argument("output", type=local_path, metavar="FILE", help="JSON lines to write")
    parser.add_argument("corpus", metavar="PREFIX", help="text corpus to hide facts in")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="the corpus's tokenizer")
    parser.add_argument("--documents", type=int, required=True, metavar="N", help="how many to write")
    parser.add_argument("--min-tokens", type=int, default=256, metavar="N", help="of the shortest (%(default)s)")
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N", help="of the longest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed writes others (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of needles")
    parser.set_defaults(run=_needles)


def _register_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="describe a corpus",
        description="Describes a corpus: documents, tokens, lengths, how well it packs, and a decoded sample.",
    )
    parser.add_argument("path", metavar="PREFIX", help="corpus: prefix, folder of pairs, or multimodal folder")
    parser.add_argument("--context-length", type=int, default=8192, metavar="N", help="window length (%(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="decodes the sample (default: as prepared)")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="document to show (%(default)s)")
    parser.set_defaults(run=_inspect)


def _tokenizer(args: argparse.Namespace) -> None:
    from aria_train.data.prepare.text_inputs import find_inputs
    from aria_train.data.text import tokenizer
    from aria_train.errors import DataError

    if bool(args.inputs) == (args.source is not None):
        raise DataError("data tokenizer: give either INPUT files to train on, or --from FOLDER to copy; not both.")
    if args.source is not None:
        made = tokenizer.copy_tokenizer(args.source, args.output, args.overwrite)
    else:
        if not 1 <= args.max_bytes < 2**63:
            raise DataError(f"--max-bytes {args.max_bytes}: must be a number of bytes, 1 or more, such as 1e9.")
        paths = find_inputs(args.inputs, args.glob)
        made = tokenizer.train_on_files(
            paths, args.text_key, args.vocab_size, args.output, int(args.max_bytes), args.overwrite
        )
    size, end = tokenizer.vocabulary_size(made), tokenizer.end_of_document_id(args.output, made)
    print(f"{args.output}: {size:,} tokens; documents end with id {end}. Set model.vocab_size to {size} or more.")


def _prepare(args: argparse.Namespace) -> None:
    from aria_train.errors import DataError

    if not 0 <= args.holdout_fraction < 1:
        raise DataError(f"--holdout-fraction {args.holdout_fraction}: must be at least 0 and below 1, such as 0.01.")
    if args.processes is not None and args.processes < 1:
        raise DataError(f"--processes {args.processes}: must be 1 or more.")
    if args.format == "text":
        from aria_train.data.prepare import text as prepare

        prepare.prepare(args)
    else:
        from aria_train.data.prepare import multimodal as prepare_multimodal

        prepare_multimodal.prepare(args)


def _concatenate(args: argparse.Namespace) -> None:
    from aria_train.data.prepare import long as prepare_long

    prepare_long.concatenate(args)


def _needles(args: argparse.Namespace) -> None:
    from pathlib import Path

    from aria_train.data.text.needles import Haystack, refuse_existing, write_training_data
    from aria_train.errors import DataError

    if args.documents < 1 or args.seed < 0:
        raise DataError("data needles: --documents must be 1 or more, and --seed 0 or more.")
    output = Path(args.output)
    refuse_existing(output, args.overwrite)
    haystack = Haystack(args.corpus, args.tokenizer)
    size = args.documents, args.min_tokens, args.max_tokens
    tokens = write_training_data(output, haystack, *size, seed=args.seed)
    print(f"{args.output}: {args.documents:,} documents, {tokens:,} tokens")


def _inspect(args: argparse.Namespace) -> None:
    from aria_train.data.prepare import inspection

    inspection.inspect(args)
