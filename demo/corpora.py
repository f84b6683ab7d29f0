"""All that the four small stages read, made on this machine where it is not there yet."""

from __future__ import annotations

from pathlib import Path

from demo import images, instructions, text
from demo.shell import aria_train, run_script

NEEDLES, SHORT_NEEDLES = text.DATA / "needles", text.DATA / "needles_short"


def prepare() -> None:
    """Text, images, facts hidden in text, and instructions."""
    images.prepare()
    _prepare_needles(NEEDLES, 4000, 64, 1024)
    instructions.prepare()


def prepare_short_needles() -> None:
    """Facts in documents of at most half a window of the first stages, which only `make needle` trains on."""
    _prepare_needles(SHORT_NEEDLES, 30_000, 96, 128)


def _prepare_needles(corpus: Path, documents: int, shortest: int, longest: int) -> None:
    if all(corpus.with_suffix(suffix).exists() for suffix in (".idx", ".bin")):
        return
    lines = images.RAW / f"{corpus.name}.jsonl"
    options = [f"--documents={documents}", f"--min-tokens={shortest}", f"--max-tokens={longest}"]
    tokenizer = f"--tokenizer={text.TOKENIZER}"
    aria_train("data", "needles", str(lines), str(text.CORPUS), tokenizer, *options)
    aria_train("data", "prepare", str(corpus), str(lines), tokenizer, "--overwrite")


if __name__ == "__main__":
    run_script(prepare)
