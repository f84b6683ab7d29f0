"""From a record (a conversation, a document, a captioned image) to a sample of token ids, loss mask and images.

A conversation is `<|im_start|>{role}\\n{content}<|im_end|>\\n` per message. An image is
`<fim_prefix><|img|><fim_suffix>`, its `<|img|>` repeated once per visual token; a video is its frames as images.
Documents and captions end with the tokenizer's end-of-document token. Loss falls on text only: never on image tokens
nor on the markers beside them.

Records, one JSON object per line (or the same keys as columns of a table):

    chat         {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                               {"role": "assistant", "content": "A cat."}], "images": ["cat.png"]}
                 {"messages": [... {"type": "video"} ...], "video": {"path": "cat.mp4", "num_frames": 8}}
                 {"image": "cat.png", "question": "What?", "answer": "A cat."}
    interleaved  {"content": [{"type": "text", "text": "A cat"}, {"type": "image", "image": "cat.png"}]}
                 {"texts": ["A cat", null], "images": [null, "cat.png"]}
    captions     {"image": "cat.png", "caption": "A cat."}

An image is a path, bytes, or {"bytes", "path"}. `category` (text) and `image_size` (a size class) may be added to any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aria_train.config import ModelConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.images import BadImage
from aria_train.data.multimodal.store import Placement, Sample
from aria_train.data.text import tokenizer
from aria_train.errors import DataError

Format = Literal["chat", "interleaved", "captions"]

ROLES = ("system", "user", "assistant", "tool")
MAX_FILE_BYTES = 256 << 20
"""Image files beyond this are not read."""

_PLACEHOLDER = re.compile(r"<\|img\|>|<image>")
"""Stands for an image in the text of a message, where a conversation is written with plain strings."""


class BadRecord(Exception):
    """A record that cannot become a sample: a reason that groups it in the report, and the detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Recipe:
    """All that decides what a record becomes, beside the record."""

    tokenizer: str
    model: ModelConfig
    format: Format
    loss: Literal["assistant", "text"]
    """chat: targets are what the assistant says, or all text."""
    image_size: int | None = None
    """Size class of every image; None: the smallest that holds it."""
    split_unit: int | None = None
    """Splits images beyond their class into crops, on grids that are multiples of this."""
    check_images: bool = True
    """Decodes every image once, so that none turns out broken in training."""
    image_root: str | None = None
    """What image paths are relative to; None: the folder of the file that names them."""
    image_key: str = "image"
    text_key: str = "text"
    question_key: str = "question"
    answer_key: str = "answer"

    @property
    def columns(self) -> frozenset[str]:
        """Keys of a record that are looked at."""
        keys = {"messages", "images", "video", "content", "texts", "caption", "category", "image_size"}
        return frozenset(keys | {self.image_key, self.text_key, self.question_key, self.answer_key})


class Encoder:
    """Turns records into samples. Raises DataError if the tokenizer cannot express what the recipe asks for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tokenizer = tokenizer.load_tokenizer(recipe.tokenizer)
        # Text that spells a special token is text: data must not be able to forge turns or images.
        self._tokenizer.encode_special_tokens = True
        names = ("<|im_start|>", "<|im_end|>", "<|img|>", "<fim_prefix>", "<fim_suffix>")
        found = {name: self._tokenizer.token_to_id(name) for name in names}
        missing = [name for name, number in found.items() if number is None]
        if missing:
            raise DataError(
                f"{recipe.tokenizer}: the tokenizer has no {', '.join(missing)}, which multimodal samples are written "
                "with. Use Aria's tokenizer, or one made by `aria-train data tokenizer`."
            )
        numbers = [number for number in found.values() if number is not None]
        self.message_start, self.message_end, self.image_token, self.image_prefix, self.image_suffix = numbers
        if self.image_token != recipe.model.image_token_id:
            raise DataError(
                f"{recipe.tokenizer}: <|img|> is token {self.image_token}, but model.image_token_id is "
                f"{recipe.model.image_token_id}. Use the model's tokenizer, or set model.image_token_id."
            )
        self.end_of_document = tokenizer.end_of_document_id(recipe.tokenizer, self._tokenizer)

    def encode(self, record: dict[str, Any], origin: str) -> Sample:
        """The sample of a record; `origin` (`FILE:LINE`) names it and says what its paths are relative to.

        Raises BadRecord.
        """
        draft = _Draft(self, _Media(record, self.recipe, Path(origin).parent))
        write = {"chat": self._chat, "interleaved": self._interleaved, "captions": self._captions}[self.recipe.format]
        write(record, draft)
        category = record.get("category")
        return draft.finish(category if isinstance(category, str) else self.recipe.format, origin)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _chat(self, record: dict[str, Any], draft: _Draft) -> None:
        everything = self.recipe.loss == "text"
        for role, items in self._messages(record, draft.media):
            learned = everything or role == "assistant"
            draft.token(self.message_start, everything)
            draft.text(f"{role}\n", everything)
            if role == "assistant":
                draft.end_text()  # what is generated begins here: its tokens do not depend on the prompt's last ones
            draft.items(items, learned)
            draft.token(self.message_end, learned)
            draft.text("\n", learned)
        draft.end_text()
        if not any(draft.loss):
            raise BadRecord("no assistant turn", "loss falls on what the assistant says; --loss text trains on all")

    def _messages(self, record: dict[str, Any], media: _Media) -> Iterator[tuple[str, list[Any]]]:
        """(role, items) of every message; a question with its answer is a conversation too."""
        messages = record.get("messages")
        question, answer = record.get(self.recipe.question_key), record.get(self.recipe.answer_key)
        if messages is None and question is not None and answer is not None:
            pictures: list[Any] = [{"type": "image"}] * media.remaining
            yield "user", [*pictures, {"type": "text", "text": question}]
            yield "assistant", [{"type": "text", "text": answer}]
            return
        if not isinstance(messages, list) or not messages:
            raise BadRecord("no messages", f"keys: {', '.join(list(record)[:8])}")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                role = message.get("role") if isinstance(message, dict) else message
                raise BadRecord("unknown role", f"{role!r:.40}; known: {', '.join(ROLES)}")
            content = message.get("content")
            if isinstance(content, str):
                content = _split_placeholders(content) if media.given else [{"type": "text", "text": content}]
            if not isinstance(content, list):
                raise BadRecord("message without content", f"a {type(content).__name__}")
            yield message["role"], content

    def _interleaved(self, record: dict[str, Any], draft: _Draft) -> None:
        content, texts, pictures = record.get("content"), record.get("texts"), record.get("images")
        if content is None and isinstance(texts, list) and isinstance(pictures, list):
            content = _merge_columns(texts, pictures)
            draft.media.clear()  # the images are in `content` now
        if not isinstance(content, list) or not content:
            raise BadRecord("no content", f"keys: {', '.join(list(record)[:8])}")
        draft.items(content, True)
        if not draft.has_text:
            raise BadRecord("no text", "nothing in it can be learned")
        draft.token(self.end_of_document, True)

    def _captions(self, record: dict[str, Any], draft: _Draft) -> None:
        caption = record.get(self.recipe.text_key)
        caption = record.get("caption") if caption is None else caption
        if caption is None:
            raise BadRecord(
                "no caption", f"no key {self.recipe.text_key!r} or 'caption'; keys: {', '.join(list(record)[:8])}"
            )
        draft.items([{"type": "image"}, {"type": "text", "text": caption}], True)
        if not draft.has_text:
            raise BadRecord("no text", "an empty caption")
        draft.token(self.end_of_document, True)


class _Draft:
    """A sample being written."""

    def __init__(self, encoder: Encoder, media: _Media) -> None:
        self.encoder, self.media = encoder, media
        self.tokens: list[int] = []
        self.loss: list[int] = []
        self.images: list[bytes] = []
        self.placements: list[Placement] = []
        self.has_text = False
        self._text, self._text_loss = "", False

    def items(self, items: list[Any], loss: bool) -> None:
        """Text, images and videos in order."""
        for item in items:
            kind = _kind_of(item)
            if kind == "text":
                self.text(_checked_text(item.get("text")), loss)
            elif kind == "image":
                self.image(*self.media.image(item.get("image")))
            else:
                for frame in self.media.video(item.get("video")):
                    self.image(*frame, size=min(self.media.vision.image_sizes))

    def text(self, text: str, loss: bool) -> None:
        """Text, joined to what stands directly before it."""
        if self._text and self._text_loss != loss:
            self.end_text()
        self._text, self._text_loss = self._text + text, loss
        self.has_text = self.has_text or bool(text.strip())

    def end_text(self) -> None:
        """Encodes what text there is: what follows is encoded by itself."""
        if self._text:
            ids = self.encoder.text_ids(self._text)
            self.tokens += ids
            self.loss += [int(self._text_loss)] * len(ids)
        self._text = ""

    def token(self, number: int, loss: bool) -> None:
        self.end_text()
        self.tokens.append(number)
        self.loss.append(int(loss))

    def image(self, name: str, data: bytes, size: int | None = None) -> None:
        """An image, with its markers; `size` overrides the class that the record or the recipe says."""
        try:
            width, height = images.decode(data).size if self.encoder.recipe.check_images else images.read_size(data)
        except BadImage as error:
            raise BadRecord("broken image", f"{name}: {error}") from None
        split = None if size else self.encoder.recipe.split_unit
        layout = images.layout_of(width, height, self.media.vision, size or self.media.size, split)
        self.token(self.encoder.image_prefix, False)
        self.placements.append(Placement(len(self.tokens), layout))
        self.images.append(data)
        self.tokens += [self.encoder.image_token] * layout.num_tokens
        self.loss += [0] * layout.num_tokens
        self.token(self.encoder.image_suffix, False)

    def finish(self, category: str, origin: str) -> Sample:
        self.end_text()
        self.media.expect_none_left()
        if not any(self.loss[1:]):
            raise BadRecord("no text", "nothing in it can be learned")
        return Sample(
            token_ids=np.array(self.tokens, np.int32),
            loss=np.array(self.loss, np.uint8),
            images=self.images,
            placements=self.placements,
            category=category,
            origin=origin,
        )


class _Media:
    """The images and videos that come with a record, handed out in order."""

    def __init__(self, record: dict[str, Any], recipe: Recipe, folder: Path) -> None:
        self._folder = Path(recipe.image_root) if recipe.image_root is not None else folder
        self._model = recipe.model
        given = record.get("images")
        given = record.get(recipe.image_key) if given is None else given
        self._images: list[Any] = list(given) if isinstance(given, list) else [] if given is None else [given]
        self._videos: list[Any] = [] if record.get("video") is None else [record["video"]]
        self._next_image = self._next_video = 0
        self.size = self._size(record.get("image_size"), recipe)

    @property
    def given(self) -> int:
        """Images listed with the record."""
        return len(self._images)

    @property
    def remaining(self) -> int:
        return len(self._images) - self._next_image

    @property
    def vision(self) -> images.VisionConfig:
        if self._model.vision is None:
            raise DataError(
                "the model's configuration has no model.vision section, so images have no size and no tokens. Give "
                "the configuration of a model with a vision encoder."
            )
        return self._model.vision

    def clear(self) -> None:
        self._images = []

    def _size(self, size: Any, recipe: Recipe) -> int | None:
        if size is None:
            return recipe.image_size
        if not isinstance(size, int) or size not in self.vision.image_sizes:
            raise BadRecord("unknown image_size", f"{size!r:.40}; known: {sorted(self.vision.image_sizes)}")
        return size

    def image(self, inline: Any) -> tuple[str, bytes]:
        """(name, bytes) of the image an item holds, or of the next one of the record's list."""
        if inline is None:
            if self._next_image >= len(self._images):
                raise BadRecord(
                    "more image placeholders than images", f"{self._next_image + 1} or more, {self.given} image(s)"
                )
            inline = self._images[self._next_image]
            self._next_image += 1
        return self._read(inline)

    def _read(self, given: Any) -> tuple[str, bytes]:
        if isinstance(given, dict) and given.get("bytes") is not None:
            return str(given.get("path") or "image"), _checked_bytes(given["bytes"])
        if isinstance(given, (bytes, bytearray)):
            return "image", bytes(given)
        path = self._path(given, "image")
        if not path.is_file():
            raise BadRecord("missing image", str(path))
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadRecord("broken image", f"{path}: over {MAX_FILE_BYTES >> 20} MiB")
            return str(path), path.read_bytes()
        except OSError as error:
            raise BadRecord("unreadable image", f"{path}: {error}") from None

    def _path(self, given: Any, what: str) -> Path:
        given = given.get("path") if isinstance(given, dict) else given
        if not isinstance(given, str) or not given:
            raise BadRecord(f"{what} without a path", f"{given!r:.60}")
        if re.match(r"[a-z]+://", given):
            raise BadRecord(f"{what} is an address", f"{given:.100}; download it and give its path")
        return self._folder / given

    def video(self, inline: Any) -> list[tuple[str, bytes]]:
        """(name, bytes) of every sampled frame."""
        from aria_train.data.multimodal.video import sample_frames  # its decoder is slow to import

        if inline is None:
            if self._next_video >= len(self._videos):
                raise BadRecord("more video placeholders than videos", f"{len(self._videos)} video(s)")
            inline = self._videos[self._next_video]
            self._next_video += 1
        num_frames = inline.get("num_frames") if isinstance(inline, dict) else None
        if not isinstance(num_frames, int):
            raise BadRecord("video without num_frames", "a video is {path, num_frames}")
        path = self._path(inline, "video")
        if not path.is_file():
            raise BadRecord("missing video", str(path))
        try:
            frames = sample_frames(path, num_frames, self.vision)
        except BadImage as error:
            raise BadRecord("broken video", f"{path}: {error}") from None
        return [(f"{path}, frame {number}", frame) for number, frame in enumerate(frames)]

    def expect_none_left(self) -> None:
        if self.remaining:
            raise BadRecord(
                "fewer image placeholders than images", f"{self._next_image} placeholder(s), {self.given} image(s)"
            )
        if self._next_video < len(self._videos):
            raise BadRecord("fewer video placeholders than videos", f"{self._next_video} of {len(self._videos)}")


def _kind_of(item: Any) -> str:
    """`text`, `image` or `video`, as an item says or, where it says nothing, by what it holds."""
    kinds = ("text", "image", "video")
    if isinstance(item, dict):
        kind = item.get("type") or next((kind for kind in kinds if item.get(kind) is not None), None)
        if kind in kinds:
            return kind
    raise BadRecord("unknown content item", f"{item!r:.80}; an item has type text, image or video")


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise BadRecord("text is not a string", f"a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8", "a lone surrogate") from None
    return text


def _checked_bytes(data: Any) -> bytes:
    if not isinstance(data, (bytes, bytearray)):
        raise BadRecord("image bytes are not bytes", f"a {type(data).__name__}")
    return bytes(data)


def _split_placeholders(text: str) -> list[Any]:
    items: list[Any] = []
    for number, part in enumerate(_PLACEHOLDER.split(text)):
        items += [{"type": "image"}] if number else []
        items += [{"type": "text", "text": part}] if part else []
    return items


def _merge_columns(texts: list[Any], pictures: list[Any]) -> list[Any]:
    """Parallel lists, of which each place holds a text or an image, as one list of items."""
    if len(texts) != len(pictures):
        raise BadRecord("texts and images differ in length", f"{len(texts)} and {len(pictures)}")
    items: list[Any] = []
    for text, picture in zip(texts, pictures, strict=True):
        items += [] if picture is None else [{"type": "image", "image": picture}]
        items += [] if text is None else [{"type": "text", "text": text}]
    return items
