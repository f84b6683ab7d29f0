"""Real text that every machine with Python has: the standard library's own sources, comments and docstrings.

They are written as JSON lines, a small tokenizer is trained on them, and the corpus that `configs/small/` reads is
prepared, with some documents held out, all under `data/small/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from demo.shell import DemoError, aria_train

DATA = Path("data/small")
SOURCES = DATA / "raw" / "python.jsonl"
TOKENIZER = DATA / "tokenizer"
CORPUS = DATA / "text"
VOCABULARY = 1024
HOLDOUT_FRACTION = 0.02


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below the folder, text) of every Python source in it, in a fixed order, without copies.

    Installed packages are left out, and so are files that are not UTF-8 (the library tests itself with some).
    """
    seen = set()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if "site-packages" in relative.parts or "dist-packages" in relative.parts:
            continue
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).digest()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield relative.as_posix(), text


def write_sources(folder: Path, output: Path) -> tuple[int, int]:
    """Writes a folder's Python sources as JSON lines (`path`, `text`); returns documents and characters written.

    Raises DemoError if there are none.
    """
    count = size = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_suffix(".new")
    with aside.open("w", encoding="utf-8") as file:
        for path, text in documents(folder):
            file.write(json.dumps({"path": path, "text": text}) + "\n")
            count, size = count + 1, size + len(text)
    if not count:
        aside.unlink()
        raise DemoError(f"{folder} has no Python sources, which the demo trains on. Use a Python that ships them.")
    os.replace(aside, output)
    return count, size


def gather() -> bool:
    """Writes the sources, unless they are there; returns whether they were not."""
    if SOURCES.exists():
        return False
    folder = Path(sysconfig.get_path("stdlib"))
    count, size = write_sources(folder, SOURCES)
    print(f"{count:,} files, {size / 1e6:.1f} million characters of Python from {folder} -> {SOURCES}", flush=True)
    return True


def prepare(changed: bool) -> None:
    """Makes tokenizer and corpora where they are not there yet, or are those of other sources (`changed`)."""
    if changed or not (TOKENIZER / "tokenizer.json").exists():
        changed = True
        size_option = f"--vocab-size={VOCABULARY}"
        aria_train("data", "tokenizer", str(TOKENIZER), str(SOURCES), size_option, "--overwrite")
    pairs = [Path(f"{CORPUS}{part}.{kind}") for part in ("", "_validation") for kind in ("idx", "bin")]
    if changed or not all(path.exists() for path in pairs):
        options = [f"--tokenizer={TOKENIZER}", f"--holdout-fraction={HOLDOUT_FRACTION}", "--overwrite"]
        aria_train("data", "prepare", str(CORPUS), str(SOURCES), *options)
