"""Real images with text, made on this machine: handwritten digits, pages of text, charts, and documents with pictures.

They are written as JSON lines beside PNG files under `data/small/raw/`, in the formats that `aria-train data prepare`
takes for the corpora that the multimodal stages of `configs/small/` read. The same seed makes the same files.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from demo import text

RAW = text.DATA / "raw"
MODEL_CONFIG = Path("configs/small/stage2_mm.yaml")
SEED = 0
SMALL, LARGE = 56, 112
"""Sides in pixels: the small model's two image classes."""
HELD_OUT_EVERY = 6
"""One digit of so many is held out."""
CHART_COLORS = ("#3b6ea5", "#c2571a", "#3d7a4e", "#444444")
DIGIT_QUESTION = "Which digit?"
CAPTIONS = ("{0}", "{0}", "{0}", "{0} by hand", "{0} ({1})")
"""Short, and most often the digit alone: what a caption says is learned from its first token after the image."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Record = dict[str, Any]
Sample = tuple[list[Image.Image], Callable[[list[str]], Record]]
"""Images, and a function that makes the record from the paths at which they were saved."""


# ---------------------------------------------------------------------------------------------------------------------
# Handwritten digits


class Digits:
    """scikit-learn's handwritten digits, 8 x 8 in 17 shades, drawn larger."""

    def __init__(self) -> None:
        data = load_digits()
        self._shades: NDArray[np.float64] = data.images
        self.values: list[int] = data.target.tolist()
        everything = range(len(self.values))
        self.held_out = everything[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        self.train = [index for index in everything if index not in self.held_out]

    def draw(self, index: int, rng: random.Random | None = None) -> Image.Image:
        """Dark on light, SMALL x SMALL; with `rng` shaded, turned, moved and scaled a little, as for training."""
        paper, ink = (255, 0) if rng is None else (rng.randint(215, 255), rng.randint(0, 60))
        shades = Image.fromarray((paper + (ink - paper) * self._shades[index] / 16).round().astype(np.uint8))
        canvas = Image.new("L", (SMALL, SMALL), paper)
        canvas.paste(shades.resize((SMALL - 8, SMALL - 8), Image.Resampling.BICUBIC), (4, 4))
        if rng is None:
            return canvas
        shift = (rng.randint(-1, 1), rng.randint(-1, 1))
        canvas = canvas.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, translate=shift, fillcolor=paper)
        margin = SMALL * (1 - 1 / rng.uniform(0.95, 1.05)) / 2
        box = (margin, margin, SMALL - margin, SMALL - margin)
        return canvas.transform(canvas.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=paper)


def chat(question: str, answer: str, category: str) -> Callable[[list[str]], Record]:
    """A question about images, and its answer."""

    def record(paths: list[str]) -> Record:
        content = [*({"type": "image"} for _ in paths), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": paths, "category": category}

    return record


def digit_questions(digits: Digits, rng: random.Random) -> Iterator[Sample]:
    """The training digits over and over, each time drawn a little differently."""
    for index in itertools.cycle(digits.train):
        yield [digits.draw(index, rng)], chat(DIGIT_QUESTION, str(digits.values[index]), "digits")


def held_out_digit_questions(digits: Digits) -> Iterator[Sample]:
    """The held-out digits, as they are."""
    for index in digits.held_out:
        yield [digits.draw(index)], chat(DIGIT_QUESTION, str(digits.values[index]), "digits")


def digit_captions(digits: Digits, rng: random.Random) -> Iterator[Sample]:
    """The training digits over and over, with captions."""
    for index in itertools.cycle(digits.train):
        value = digits.values[index]
        words = rng.choice(CAPTIONS).format(value, NAMES[value])

        def record(paths: list[str], words: str = words) -> Record:
            return {"image": paths[0], "text": words, "category": "captions"}

        yield [digits.draw(index, rng)], record


def documents(digits: Digits, rng: random.Random, count: int) -> Iterator[Sample]:
    """Short documents in which digits stand between the words: sums, page numbers and comparisons."""
    for _ in range(count):
        a, b = rng.choice(digits.train), rng.choice(digits.train)
        x, y = digits.values[a], digits.values[b]
        pieces = rng.choice(
            (
                ("We add two numbers. The first", f" is {x}, the second", f" is {y}. The sum is {x + y}."),
                ("Page", f" (number {x}) is followed by page", f" (number {y})."),
                ("Of these two,", " and", f", which are {x} and {y}, the larger is {max(x, y)}."),
            )
        )

        def record(paths: list[str], pieces: tuple[str, ...] = pieces) -> Record:
            content: list[Record] = []
            for piece, path in itertools.zip_longest(pieces, paths):
                content.append({"type": "text", "text": piece})
                content += [{"type": "image", "image": path}] if path else []
            return {"content": content, "category": "interleaved"}

        yield [digits.draw(a, rng), digits.draw(b, rng)], record


# ---------------------------------------------------------------------------------------------------------------------
# Pages of text


def prose(sources: Path, count: int) -> list[str]:
    """The first lines of that many docstrings, no two the same, from Python sources in JSON lines."""
    found: dict[str, None] = {}
    with sources.open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            if "test" in document["path"]:
                continue
            found.update(dict.fromkeys(_first_lines(document["text"])))
            if len(found) >= count:
                break
    return list(found)[:count]


def _first_lines(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if 12 <= len(words) <= 60 and words.isascii() and words.isprintable():
                yield words


def pages(lines: Iterable[str], rng: random.Random) -> Iterator[Sample]:
    """Each text set on a page of its own, to be read aloud."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [
        ImageFont.truetype(str(folder / f"{name}.ttf"), 12) for name in ("DejaVuSansMono", "DejaVuSans", "DejaVuSerif")
    ]
    for words in lines:
        font, paper = rng.choice(fonts), rng.randint(230, 255)
        page = Image.new("L", (LARGE, LARGE), paper)
        columns = int((LARGE - 8) / font.getlength("n"))
        lines_of_page = textwrap.wrap(words, columns)
        ImageDraw.Draw(page).multiline_text(
            (4, rng.randint(3, 12)), "\n".join(lines_of_page), fill=rng.randint(0, 60), font=font, spacing=3
        )
        yield [page], chat("Read the page.", words, "pages")


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def charts(rng: random.Random, count: int) -> Iterator[Sample]:
    """Bar charts of small tables, and a question after one value."""
    canvas = chart_canvas()
    for _ in range(count):
        table = {label: rng.randint(1, 9) for label in rng.sample("ABCDEFGH", rng.randint(3, 5))}
        asked = rng.choice(list(table))
        question = chat(f"What is the value of {asked}?", str(table[asked]), "charts")
        yield [draw_chart(canvas, table, rng.choice(CHART_COLORS))], question


def chart_canvas() -> FigureCanvasAgg:
    """What all charts have in common: to make it takes longer than to draw one."""
    canvas = FigureCanvasAgg(Figure(figsize=(4, 4), dpi=56))
    axes = canvas.figure.add_axes((0.13, 0.12, 0.85, 0.84))
    axes.set_ylim(0, 10)
    axes.set_yticks([0, 5, 10])
    axes.tick_params(labelsize=22, width=2)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas


def draw_chart(canvas: FigureCanvasAgg, table: dict[str, int], color: str) -> Image.Image:
    """A bar for every value, 0 to 10, LARGE x LARGE, in place of those that are there."""
    (axes,) = canvas.figure.axes
    for bar in list(axes.patches):
        bar.remove()
    axes.bar(range(len(table)), list(table.values()), color=color, width=0.6)
    axes.set_xticks(range(len(table)), list(table))
    axes.set_xlim(-0.5, len(table) - 0.5)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return image.resize((LARGE, LARGE), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(samples: Iterable[Sample], folder: Path) -> int:
    """Writes `samples.jsonl` and the PNG files it names, all or nothing; returns the number of samples."""
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "images").mkdir(parents=True)
    number = count = 0
    with (aside / "samples.jsonl").open("w", encoding="utf-8") as file:
        for images, record in samples:
            paths = []
            for image in images:
                paths.append(f"images/{number:05}.png")
                image.save(aside / paths[-1])
                number += 1
            file.write(json.dumps(record(paths)) + "\n")
            count += 1
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return count


def make_all(sources: Path, folder: Path, seed: int = SEED, scale: float = 1.0) -> dict[str, int]:
    """Writes every kind that is not there yet below `folder`; returns how many samples each got.

    `sources` are the Python sources in JSON lines that pages are set from; `scale` makes less of everything.
    """
    digits = Digits()

    def some(count: int) -> int:
        return round(count * scale)

    kinds: dict[str, Callable[[random.Random], Iterable[Sample]]] = {
        "digits": lambda rng: itertools.islice(digit_questions(digits, rng), some(3000)),
        "digits_validation": lambda rng: held_out_digit_questions(digits),
        "captions": lambda rng: itertools.islice(digit_captions(digits, rng), some(5000)),
        "interleaved": lambda rng: documents(digits, rng, some(500)),
        "pages": lambda rng: pages(prose(sources, some(1000)), rng),
        "charts": lambda rng: charts(rng, some(500)),
    }
    return {
        name: write(make(random.Random(f"{seed} {name}")), folder / name)
        for name, make in kinds.items()
        if not (folder / name).exists()
    }


FORMATS = {"captions": "captions", "interleaved": "interleaved"}
"""How each kind is written; the others are conversations."""
HOLDOUT_FRACTION = 0.05


def jobs(made: Collection[str]) -> list[list[list[str]]]:
    """What prepares the corpora that are not there yet, or whose images were just `made`."""
    found = []
    for name in ("digits", "digits_validation", "captions", "interleaved", "pages", "charts"):
        if name in made or not (text.DATA / name).exists():
            held_out = [] if name.startswith("digits") else [f"--holdout-fraction={HOLDOUT_FRACTION}"]
            found.append([prepare_command(name, FORMATS.get(name, "chat"), *held_out)])
    return found


def prepare_command(name: str, kind: str, *options: str) -> list[str]:
    """`data prepare` of the samples of that name, in one process: several corpora are prepared at once."""
    fixed = [f"--format={kind}", f"--tokenizer={text.TOKENIZER}", f"--model-config={MODEL_CONFIG}", *options]
    prepare = ["data", "prepare", str(text.DATA / name), str(RAW / name / "samples.jsonl"), *fixed]
    return [*prepare, "--processes=1", "--overwrite"]
