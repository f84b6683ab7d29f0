"""What a model is asked: text and images as token ids, written exactly as the corpora it was trained on.

A prompt is plain text to be continued, or a conversation's first turn (`chat`). An image is
`<fim_prefix><|img|><fim_suffix>`, its `<|img|>` repeated once per visual token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

from aria_train.batch import IGNORE_LABEL, MicroBatch
from aria_train.config import ModelConfig, VisionConfig
from aria_train.data.loader import pack_windows
from aria_train.data.multimodal import images
from aria_train.data.multimodal.formats import MAX_FILE_BYTES
from aria_train.data.multimodal.images import BadImage, ImageLayout
from aria_train.data.multimodal.store import Sample
from aria_train.data.text.tokenizer import load_tokenizer
from aria_train.data.window import Window
from aria_train.errors import DataError

_PLACEHOLDER = re.compile(r"(?:<fim_prefix>)?<\|img\|>(?:<fim_suffix>)?")


@dataclass(frozen=True)
class Picture:
    """An image of a prompt, still compressed: a long prompt's pixels are made only when it is its turn."""

    data: bytes
    layout: ImageLayout


@dataclass(frozen=True)
class Prompt:
    """Token ids, images expanded, and the answer expected of the model where there is one."""

    token_ids: list[int]
    pictures: list[Picture] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + len(self.answer)


def pack_prompts(prompts: Sequence[Prompt], vision: VisionConfig | None) -> MicroBatch:
    """Prompts with their answers as one micro-batch, each a document; its targets are the answers."""
    return pack_windows([_window(prompt, vision) for prompt in prompts], [0] * len(prompts))


def _window(prompt: Prompt, vision: VisionConfig | None) -> Window:
    tokens = np.array([*prompt.token_ids, *prompt.answer[:-1]], np.int32)
    labels = np.full(len(tokens), IGNORE_LABEL, np.int32)
    if prompt.answer:
        labels[len(prompt.token_ids) - 1 :] = prompt.answer
    window = Window(tokens, labels, np.array([len(tokens)], np.int32))
    for picture in prompt.pictures:
        assert vision is not None, "a prompt with images was written for a model that sees"
        try:
            window.images += images.process(images.decode(picture.data), picture.layout, vision)
        except BadImage as error:
            raise DataError(f"an image of a prompt cannot be used: {error}.") from None
    return window


class PromptWriter:
    """Writes prompts for a model. Raises DataError where the tokenizer, an image or the text does not fit it."""

    def __init__(self, tokenizer: str | Path, model: ModelConfig, image_size: int | None = None) -> None:
        """`image_size`: size class of every image; None: the smallest that holds it."""
        self.folder, self.model, self.image_size = tokenizer, model, image_size
        self.tokenizer = load_tokenizer(tokenizer)
        check_vocabulary(self.tokenizer, tokenizer, model)
        if image_size is not None and image_size not in self._vision.image_sizes:
            raise DataError(f"--image-size {image_size}: must be one of {sorted(self._vision.image_sizes)}.")

    def continuation(self, text: str, pictures: Sequence[bytes] = ()) -> Prompt:
        """Text to be continued. Special tokens in it are what they spell."""
        parts = self._parts(text, pictures)
        return self._write(parts, specials_are_text=False)

    def chat(self, text: str, pictures: Sequence[bytes] = ()) -> Prompt:
        """A user's turn, and the opening of the assistant's. Special tokens in the text are but text."""
        start, end = self.token("<|im_start|>"), self.token("<|im_end|>")
        turn = ["user\n", *self._parts(text, pictures)]
        return self._write([start, *turn, end, "\n", start, "assistant\n"], specials_are_text=True)

    def token(self, name: str) -> int:
        """The id of a special token."""
        number = self.tokenizer.token_to_id(name)
        if number is None:
            raise DataError(
                f"{self.folder}: the tokenizer has no {name}, which conversations and images are written with. Use the "
                "tokenizer that the model's corpora were prepared with."
            )
        return int(number)

    def _parts(self, text: str, pictures: Sequence[bytes]) -> list[str | int | Picture]:
        """Text and images in order; images without placeholders stand before the text."""
        texts = _PLACEHOLDER.split(text)
        placeholders = len(texts) - 1
        if placeholders == 0 and pictures:
            texts = [""] * len(pictures) + [text]
        elif placeholders != len(pictures):
            raise DataError(
                f"the prompt has {placeholders} image placeholder(s) <|img|>, but {len(pictures)} image(s) are given. "
                "Give one --image per placeholder, or leave all placeholders out: images then come before the text."
            )
        parts: list[str | int | Picture] = [texts[0]]
        for data, behind in zip(pictures, texts[1:], strict=True):
            parts += [self._picture(data), behind]
        return parts

    def image_ids(self, picture: Picture) -> list[int]:
        """An image's tokens, its markers included."""
        image = [self.model.image_token_id] * picture.layout.num_tokens
        return [self.token("<fim_prefix>"), *image, self.token("<fim_suffix>")]

    def _picture(self, data: bytes) -> Picture:
        width, height = images.read_size(data)
        return Picture(data, images.layout_of(width, height, self._vision, self.image_size))

    def _write(self, parts: Sequence[str | int | Picture], specials_are_text: bool) -> Prompt:
        self.tokenizer.encode_special_tokens = specials_are_text
        prompt, text = Prompt([]), ""
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part  # stretches of text that touch are one to the tokenizer
                continue
            prompt.token_ids.extend(self.tokenizer.encode(text, add_special_tokens=False).ids)
            text = ""
            if isinstance(part, int):
                prompt.token_ids.append(part)
            elif part is not None:
                prompt.token_ids.extend(self.image_ids(part))
                prompt.pictures.append(part)
        return prompt

    def asked(self, sample: Sample) -> Prompt | None:
        """A conversation up to its last answer, and that answer with its closing tag; None if nothing is answered."""
        learned = np.flatnonzero(sample.loss)
        if not len(learned):
            return None
        runs = np.flatnonzero(np.diff(learned) > 1)
        start = int(learned[runs[-1] + 1] if len(runs) else learned[0])
        ids: list[int] = sample.token_ids.tolist()
        end = self.token("<|im_end|>")
        behind = ids.index(end, start) + 1 if end in ids[start:] else len(ids)
        pictures = [
            Picture(data, placement.layout)
            for data, placement in zip(sample.images, sample.placements, strict=True)
            if placement.start < start
        ]
        return Prompt(ids[:start], pictures, ids[start:behind])

    @property
    def _vision(self) -> VisionConfig:
        if self.model.vision is None:
            raise DataError("this model has no vision encoder: it reads text only. Leave the images out.")
        return self.model.vision


def check_vocabulary(tokenizer: tokenizers.Tokenizer, folder: str | Path, model: ModelConfig) -> None:
    """Raises DataError for a tokenizer of more tokens than the model has."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > model.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {size:,} tokens, more than model.vocab_size {model.vocab_size:,}. Use the "
            "tokenizer that the model's corpora were prepared with."
        )


def read_picture(path: str | Path) -> bytes:
    """The bytes of an image file that can be decoded. Raises DataError that says what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB, too large for an image.")
        data = path.read_bytes()
        images.decode(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give the path of an image file.") from None
    except BadImage as error:
        raise DataError(f"{path}: cannot be used as an image: {error}.") from None
    return data
