"""What the last stage teaches: to do as asked about an image, and not just to name it.

`python -m demo.instructions` writes questions about handwritten digits that no earlier stage asks, in the format that
`aria-train data prepare` takes, and prepares the corpora of `configs/small/stage4_post.yaml`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from demo import images, text
from demo.shell import aria_train, run_script

TRAINING, HELD_OUT = "instructions", "instructions_validation"
COUNT = 2400

TASKS: tuple[tuple[str, Callable[[int], str]], ...] = (
    ("Is it even?", lambda value: "no" if value % 2 else "yes"),
    ("Which digit comes next?", lambda value: str((value + 1) % 10)),
    ("Name it.", lambda value: images.NAMES[value]),
)
"""Questions, and what is right to answer for a digit."""


def instructions(digits: images.Digits, rng: random.Random) -> Iterator[images.Sample]:
    """The training digits over and over, drawn a little differently each time, each with a random question."""
    for index in itertools.cycle(digits.train):
        question, answer = rng.choice(TASKS)
        yield [digits.draw(index, rng)], images.chat(question, answer(digits.values[index]), "instructions")


def held_out_instructions(digits: images.Digits) -> Iterator[images.Sample]:
    """The held-out digits as they are, with the questions in turn."""
    for index, (question, answer) in zip(digits.held_out, itertools.cycle(TASKS), strict=False):
        yield [digits.draw(index)], images.chat(question, answer(digits.values[index]), "instructions")


def prepare() -> None:
    """Makes whatever is not there yet."""
    digits = images.Digits()
    made = {
        TRAINING: lambda: itertools.islice(instructions(digits, random.Random(images.SEED)), COUNT),
        HELD_OUT: lambda: held_out_instructions(digits),
    }
    for name, samples in made.items():
        corpus = text.DATA / name
        if not corpus.exists():
            images.write(samples(), images.RAW / name)
            options = [f"--tokenizer={text.TOKENIZER}", f"--model-config={images.MODEL_CONFIG}", "--overwrite"]
            source = str(images.RAW / name / "samples.jsonl")
            aria_train("data", "prepare", str(corpus), source, "--format=chat", *options)


if __name__ == "__main__":
    run_script(prepare)
