"""Types of command-line arguments: what argparse calls with the text that was given."""

from __future__ import annotations

import argparse


def local_path(text: str) -> str:
    """A path of this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: is a URL; only a path of this machine can be written to.")
    return text
