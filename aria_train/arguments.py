"""What the parts of the command line share."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable


def command(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """A command whose module is imported when it runs."""

    def run(args: argparse.Namespace) -> None:
        getattr(importlib.import_module(module), function)(args)

    return run


def local_path(text: str) -> str:
    """Type of an argument: a path of this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: is a URL; only a path of this machine can be written to.")
    return text
