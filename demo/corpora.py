"""All that the four small stages read, made on this machine where it is not there yet."""

from __future__ import annotations

from demo import images, instructions, text
from demo.shell import aria_train, run_script

NEEDLES = text.DATA / "needles"
DOCUMENTS, SHORTEST, LONGEST = 4000, 64, 1024
"""Of the facts hidden in text: how many documents, of how many tokens."""


def prepare() -> None:
    """Text, images, facts hidden in text, and instructions."""
    images.prepare()
    if not all(NEEDLES.with_suffix(suffix).exists() for suffix in (".idx", ".bin")):
        lines = images.RAW / "needles.jsonl"
        options = [f"--documents={DOCUMENTS}", f"--min-tokens={SHORTEST}", f"--max-tokens={LONGEST}"]
        tokenizer = f"--tokenizer={text.TOKENIZER}"
        aria_train("data", "needles", str(lines), str(text.CORPUS), tokenizer, *options)
        aria_train("data", "prepare", str(NEEDLES), str(lines), tokenizer, "--overwrite")
    instructions.prepare()


if __name__ == "__main__":
    run_script(prepare)
