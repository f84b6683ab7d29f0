"""All that the four small stages read, made on this machine where it is not there yet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo import images, instructions, text
from demo.shell import aria_train_together, run_script

NEEDLES, SHORT_NEEDLES = text.DATA / "needles", text.DATA / "needles_short"


def prepare() -> None:
    """Text, images, facts hidden in text, and instructions. Images are drawn while the text is tokenized."""
    changed = text.gather()
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(_draw)
        text.prepare(changed)
        made = drawing.result()
    if made:
        print(f"\nImages with text in {images.RAW}: {', '.join(made)}", flush=True)
    # The longest first.
    needles = _needles(NEEDLES, 4000, 64, 1024)
    aria_train_together([*needles, *images.jobs(made), *instructions.jobs(made)])


def prepare_short_needles() -> None:
    """Facts in documents of at most half a window of the first stages, which only `make needle` trains on."""
    aria_train_together(_needles(SHORT_NEEDLES, 30_000, 96, 128))


def _draw() -> list[str]:
    return [*images.make_all(text.SOURCES, images.RAW), *instructions.make(images.RAW)]


def _needles(corpus: Path, documents: int, shortest: int, longest: int) -> list[list[list[str]]]:
    if all(corpus.with_suffix(suffix).exists() for suffix in (".idx", ".bin")):
        return []
    lines = images.RAW / f"{corpus.name}.jsonl"
    options = [f"--documents={documents}", f"--min-tokens={shortest}", f"--max-tokens={longest}"]
    tokenizer = f"--tokenizer={text.TOKENIZER}"
    write = ["data", "needles", str(lines), str(text.CORPUS), tokenizer, *options, "--overwrite"]
    return [[write, ["data", "prepare", str(corpus), str(lines), tokenizer, "--processes=1", "--overwrite"]]]


if __name__ == "__main__":
    run_script(prepare)
