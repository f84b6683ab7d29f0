"""What the last stage teaches: to do as asked about an image, and not just to name it.

Questions about handwritten digits that no earlier stage asks, in the format that `aria-train data prepare` takes for
the corpora of `configs/small/stage4_post.yaml`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from demo import images, text

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


def make(folder: Path) -> list[str]:
    """Writes the samples that are not there yet below `folder`; returns their names."""
    digits = images.Digits()
    kinds = {
        TRAINING: lambda: itertools.islice(instructions(digits, random.Random(images.SEED)), COUNT),
        HELD_OUT: lambda: held_out_instructions(digits),
    }
    missing = [name for name in kinds if not (folder / name).exists()]
    for name in missing:
        images.write(kinds[name](), folder / name)
    return missing


def jobs(made: Collection[str]) -> list[list[list[str]]]:
    """What prepares the corpora that are not there yet, or whose samples were just `made`."""
    names = (name for name in (TRAINING, HELD_OUT) if name in made or not (text.DATA / name).exists())
    return [[images.prepare_command(name, "chat")] for name in names]
