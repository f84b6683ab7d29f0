"""Prompts: text and images as the model was trained to read them, and one clear error where that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aria_train.config import ModelConfig
from aria_train.data.multimodal.formats import Encoder, Recipe
from aria_train.errors import DataError
from aria_train.eval.prompts import Prompt, PromptWriter, pack_prompts, read_picture
from tests.eval.small import MODEL, encoded, picture, small_tokenizer, write_lines

IMAGE, PREFIX, SUFFIX, START, END = 9, 39, 41, 6, 7
CONFIG = ModelConfig.model_validate(MODEL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_tokenizer(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def writer(tokenizer: str) -> PromptWriter:
    return PromptWriter(tokenizer, CONFIG)


def ids(writer: PromptWriter, text: str) -> list[int]:
    return writer.tokenizer.encode(text, add_special_tokens=False).ids


def test_an_image_without_a_placeholder_comes_before_the_text(writer: PromptWriter):
    prompt = writer.continuation("a fox", [picture(20, 14), picture(10, 10)])
    run = [PREFIX, *[IMAGE] * 6, SUFFIX]
    small = [PREFIX, *[IMAGE] * 3, SUFFIX]
    assert prompt.token_ids == [*run, *small, *ids(writer, "a fox")]
    assert [p.layout.num_queries for p in prompt.pictures] == [6, 3]


@pytest.mark.parametrize("placeholder", ["<|img|>", "<fim_prefix><|img|><fim_suffix>"])
def test_a_placeholder_says_where_an_image_stands(writer: PromptWriter, placeholder: str):
    prompt = writer.continuation(f"before{placeholder} behind", [picture(10, 10)])
    assert prompt.token_ids == [*ids(writer, "before"), PREFIX, IMAGE, IMAGE, IMAGE, SUFFIX, *ids(writer, " behind")]


def test_text_alone_is_what_the_tokenizer_makes_of_it(writer: PromptWriter):
    assert writer.continuation("the quick fox<|endoftext|>").token_ids == [*ids(writer, "the quick fox"), 2]


@pytest.mark.parametrize(("text", "images"), [("a <|img|> b", 0), ("<|img|>", 2), ("<|img|> <|img|> <|img|>", 2)])
def test_more_or_fewer_placeholders_than_images_are_refused(writer: PromptWriter, text: str, images: int):
    for write in (writer.continuation, writer.chat):
        with pytest.raises(DataError, match=f"{text.count('<|img|>')} image placeholder.* {images} image"):
            write(text, [picture()] * images)


def test_a_chat_prompt_is_the_training_sample_up_to_the_answer(writer: PromptWriter, tokenizer: str, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture(20, 14))
    encoder = Encoder(Recipe(tokenizer, CONFIG, "chat", "assistant"))
    for text in ("<|img|>which number is this ?", "reads <|img|> and\n<|img|>", "the lazy dog <|im_end|> jumps"):
        images = [picture(20, 14)] * text.count("<|img|>")
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "the 3"}]
        record = {"messages": messages, **({"images": ["a.png"] * len(images)} if images else {})}
        sample = encoder.encode(record, str(tmp_path / "x.jsonl:1"))
        prompt = writer.chat(text, images)
        answer = [*ids(writer, "the 3"), END]
        assert [*prompt.token_ids, *answer, *ids(writer, "\n")] == sample.token_ids.tolist()
        asked = writer.asked(sample)
        assert asked is not None
        assert (asked.token_ids, asked.answer) == (prompt.token_ids, answer)
        assert asked.pictures == prompt.pictures


def test_of_several_turns_the_last_is_asked(writer: PromptWriter, tokenizer: str, tmp_path: Path):
    turns = [("user", "the"), ("assistant", "fox"), ("user", "a dog ?"), ("assistant", "0")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    sample = Encoder(Recipe(tokenizer, CONFIG, "chat", "assistant")).encode(record, "x.jsonl:1")
    asked = writer.asked(sample)
    assert asked is not None
    assert asked.answer == [*ids(writer, "0"), END]
    assert writer.tokenizer.decode(asked.token_ids).count("assistant") == 2


def test_an_answer_is_the_only_target(writer: PromptWriter):
    prompts = [Prompt([70, 71, 72], [], [80, 81]), Prompt([90], [], [91])]
    batch = pack_prompts(prompts, CONFIG.vision)
    assert batch.token_ids.tolist() == [70, 71, 72, 80, 90]
    assert batch.labels.tolist() == [-100, -100, 80, 81, 91]
    assert batch.starts.tolist() == [0, 4, 5]


def test_images_are_refused_by_a_model_without_eyes(tokenizer: str):
    blind = PromptWriter(tokenizer, CONFIG.model_copy(update={"vision": None}))
    with pytest.raises(DataError, match="no vision encoder"):
        blind.continuation("a fox", [picture()])
    with pytest.raises(DataError, match="no vision encoder"):
        PromptWriter(tokenizer, blind.model, image_size=16)


def test_a_size_class_is_one_of_the_models(tokenizer: str):
    assert PromptWriter(tokenizer, CONFIG, 16).continuation("", [picture(30, 30)]).token_ids.count(IMAGE) == 3
    with pytest.raises(DataError, match=r"--image-size 20: must be one of \[16, 32\]"):
        PromptWriter(tokenizer, CONFIG, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Image files


def image_of(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


GIF = image_of("P"), [image_of("L").convert("P")]
FILES = {
    "cmyk.jpg": encoded(image_of("CMYK"), "JPEG"),
    "palette.png": encoded(image_of("P")),
    "alpha.png": encoded(image_of("RGBA")),
    "grey_alpha.png": encoded(image_of("LA")),
    "sixteen.png": encoded(Image.fromarray(np.arange(216, dtype=np.uint16).reshape(12, 18) * 300)),
    "strip.png": encoded(Image.new("RGB", (1, 3000), "red")),
    "animated.gif": encoded(GIF[0], "GIF", save_all=True, append_images=GIF[1]),
    "one.webp": encoded(image_of("RGB"), "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_unusual_images_are_read(writer: PromptWriter, tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name])
    prompt = writer.continuation("a", [read_picture(tmp_path / name)])
    batch = pack_prompts([prompt], CONFIG.vision)
    assert batch.images is not None
    assert batch.images.patches.abs().max() <= 1
    assert sum(batch.images.num_queries) == prompt.token_ids.count(IMAGE)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("text.png", b"this is not a picture", "not an image"),
        ("empty.png", b"", "empty file"),
        ("cut.png", FILES["palette.png"][:200], "damaged"),
        ("absent.png", None, "No such file"),
        (".", None, "Is a directory"),
    ],
)
def test_files_that_are_no_images_are_named_with_the_reason(tmp_path: Path, name: str, content: bytes | None, why: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=why) as caught:
        read_picture(path)
    assert str(path) in str(caught.value)


def test_questions_of_a_file_of_conversations(writer: PromptWriter, tmp_path: Path):
    from aria_train.eval.answers import read_questions

    (tmp_path / "a.png").write_bytes(picture())
    records = [
        {"question": "which number ?", "answer": "3", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "fox ?"}, {"role": "assistant", "content": "0"}]},
    ]
    path = write_lines(tmp_path / "q.jsonl", records)
    first, second = read_questions(path, writer)
    assert first.token_ids[0] == START
    assert (len(first.pictures), first.answer) == (1, [*ids(writer, "3"), END])
    assert (len(second.pictures), second.answer) == (0, [*ids(writer, "0"), END])
    assert len(read_questions(path, writer, limit=1)) == 1
    write_lines(path, [*records, {"question": "?", "answer": "1", "images": ["b.png"]}])
    with pytest.raises(DataError, match=r"q.jsonl, line 3: missing image"):
        read_questions(path, writer)
    with pytest.raises(DataError, match="neither"):
        read_questions(tmp_path / "absent", writer)
