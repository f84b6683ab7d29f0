"""The commands that look at a trained model. Only argparse is imported until one runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any


def register(subparsers: Any) -> None:
    """Adds `generate` to the command line's `add_subparsers` object."""
    _register_generate(subparsers)


def _register_generate(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continues a prompt of text and images, as it comes. An image stands where the prompt says "
        "<|img|>; without any, the images come before the text.",
    )
    _add_checkpoint(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="size class (default: by each image's size)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn: the model answers it")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    parser.set_defaults(run=_command("aria_train.eval.terminal", "run_generate"))


def _add_checkpoint(parser: Any) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer (default: the one the checkpoint's run named)")


def _command(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """A command whose module is imported when it runs."""

    def run(args: argparse.Namespace) -> None:
        getattr(importlib.import_module(module), function)(args)

    return run
