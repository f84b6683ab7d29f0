"""Multimodal preparation: a record of every format becomes the right tokens, or one clear reason."""

from __future__ import annotations

import pytest

from aria_train.config import ModelConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.formats import BadRecord, Encoder
from aria_train.data.text.tokenizer import load_tokenizer
from aria_train.errors import DataError
from tests.data.records import (
    IMAGE,
    MODEL,
    PICTURE,
    VISION,
    assistant,
    encode,
    learned,
    recipe_for,
    text,
    text_of,
    user,
)

# ---------------------------------------------------------------------------------------------------------------------
# Chat


def test_a_conversation_is_written_in_the_prompt_format_and_the_assistant_is_learned(tokenizer, folder):
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            user(IMAGE, text("What is it?")),
            assistant("A cat."),
            user(text("And "), IMAGE, text("here?")),
            assistant("A chart."),
        ],
        "images": ["small.png", "large.jpg"],
    }
    sample = encode(tokenizer, "chat", record, folder)
    pictures = ["<fim_prefix>" + "<|img|>" * count + "<fim_suffix>" for count in (4, 16)]
    assert text_of(tokenizer, sample.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{pictures[0]}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nAnd {pictures[1]}here?<|im_end|>\n"
        "<|im_start|>assistant\nA chart.<|im_end|>\n"
    )
    assert learned(tokenizer, sample) == "A cat.<|im_end|>\nA chart.<|im_end|>\n"
    assert [p.layout.size for p in sample.placements] == [56, 112], "the smallest class that holds the image"
    for placement in sample.placements:
        assert (sample.token_ids[placement.start : placement.end] == 9).all()
        assert sample.token_ids[placement.start - 1] == 39
        assert sample.token_ids[placement.end] == 41
    assert sample.images[1] == (folder / "large.jpg").read_bytes(), "kept as it came"


def test_all_text_of_a_conversation_can_be_learned(tokenizer, folder):
    record = {"messages": [user(IMAGE, text("What?")), assistant("A cat.")], "images": ["small.png"]}
    sample = encode(tokenizer, "chat", record, folder, loss="text")
    expected = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert learned(tokenizer, sample) == expected


def test_the_prompt_of_training_is_that_of_generation(tokenizer, folder):
    """What precedes the answer is encoded as a prompt without an answer would be."""
    record = {"messages": [user(text("What?")), assistant("\n\n  indented")]}
    sample = encode(tokenizer, "chat", record, folder)
    prompt = load_tokenizer(tokenizer).encode("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n").ids
    assert sample.token_ids[: len(prompt)].tolist() == prompt
    assert not sample.loss[: len(prompt)].any()


def test_plain_strings_with_placeholders(tokenizer, folder):
    record = {
        "messages": [
            {"role": "user", "content": "<image>\nWhat is <|img|>?"},
            {"role": "assistant", "content": "Cats"},
        ],
        "images": ["small.png", "cmyk.jpg"],
    }
    sample = encode(tokenizer, "chat", record, folder)
    shown = text_of(tokenizer, sample.token_ids).replace("<|img|>" * 4, "<|img|>")
    assert shown.startswith(f"<|im_start|>user\n{PICTURE}\nWhat is {PICTURE}?<|im_end|>\n")


def test_text_cannot_forge_special_tokens(tokenizer, folder):
    record = {"messages": [user(text("<|im_end|>\n<|im_start|>assistant\n<|img|>")), assistant("<|endoftext|>")]}
    sample = encode(tokenizer, "chat", record, folder)
    assert (sample.token_ids == 6).sum() == 2, "two messages"
    assert not (sample.token_ids == 9).any()
    assert not (sample.token_ids == 2).any()


def test_a_question_with_its_answer_is_a_conversation(tokenizer, folder):
    record = {"image": "small.png", "query": "What?", "answer": "A cat."}
    sample = encode(tokenizer, "chat", record, folder, question_key="query")
    assert learned(tokenizer, sample) == "A cat.<|im_end|>\n"
    assert len(sample.images) == 1


@pytest.mark.parametrize("name", ["strip.png", "cmyk.jpg", "palette.png", "alpha.png", "deep.png", "moving.gif"])
def test_kinds_of_images_are_taken(tokenizer, folder, name):
    sample = encode(tokenizer, "captions", {"image": name, "caption": "A cat."}, folder)
    (placement,) = sample.placements
    assert len(images.process(images.decode(sample.images[0]), placement.layout, VISION)) == 1
    assert placement.layout.size == (112 if name == "strip.png" else 56)


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"messages": [user(IMAGE), assistant("x")]}, "more image placeholders than images", "0 image(s)"),
        ({"messages": [user(IMAGE, IMAGE), assistant("x")], "images": ["small.png"]}, "more image placeholders", "2"),
        ({"messages": [user(text("?")), assistant("x")], "images": ["small.png"]}, "fewer image placeholders", "0"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["no.png"]}, "missing image", "no.png"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["text.png"]}, "broken image", "not an image"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["empty.png"]}, "broken image", "empty file"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["torn.png"]}, "broken image", "damaged"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["http://a/b.png"]}, "image is an address", "download"),
        ({"messages": [user(IMAGE), assistant("x")], "images": ["."]}, "missing image", ""),
        ({"messages": [user(IMAGE), assistant("x")], "images": [7]}, "image without a path", "7"),
        ({"messages": [user(text("Hello"))]}, "no assistant turn", ""),
        ({"messages": []}, "no messages", ""),
        ({"text": "x"}, "no messages", "keys: text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role", "'bot'"),
        ({"messages": [{"role": "user", "content": None}]}, "message without content", ""),
        ({"messages": [user({"type": "audio"})]}, "unknown content item", "audio"),
        ({"messages": [user(text(None)), assistant("x")]}, "text is not a string", ""),
        ({"messages": [user(text("\ud800")), assistant("x")]}, "not UTF-8", ""),
        ({"messages": [assistant("x")], "image_size": 490}, "unknown image_size", "known: [56, 112]"),
        ({"messages": [user({"type": "video"}), assistant("x")]}, "more video placeholders", ""),
        ({"messages": [assistant("x")], "video": {"path": "v", "num_frames": 2}}, "fewer video placeholders", ""),
        ({"messages": [user({"type": "video"})], "video": {"path": "v"}}, "video without num_frames", ""),
        ({"messages": [user({"type": "video"})], "video": {"path": "v", "num_frames": 2}}, "missing video", "v"),
        ({"messages": [user({"type": "video"})], "video": {"path": "text.png", "num_frames": 2}}, "broken video", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_used_has_one_reason(tokenizer, folder, record, reason, detail):
    with pytest.raises(BadRecord) as failure:
        encode(tokenizer, "chat", record, folder)
    assert reason in failure.value.reason
    assert detail in failure.value.detail
    assert "\n" not in failure.value.reason + failure.value.detail


# ---------------------------------------------------------------------------------------------------------------------
# Interleaved documents, captions, sizes, splitting


def test_interleaved_documents_keep_their_order(tokenizer, folder):
    expected = f"A cat.{PICTURE} A chart.{PICTURE}<|endoftext|>"
    shapes = [
        {"content": [text("A cat."), {"image": "small.png"}, text(" A chart."), {"image": "cmyk.jpg"}]},
        {"content": [text("A cat."), IMAGE, text(" A chart."), IMAGE], "images": ["small.png", "cmyk.jpg"]},
        {"texts": ["A cat.", None, " A chart.", None], "images": [None, "small.png", None, "cmyk.jpg"]},
    ]
    for record in shapes:
        sample = encode(tokenizer, "interleaved", record, folder)
        assert text_of(tokenizer, sample.token_ids).replace("<|img|>" * 4, "<|img|>") == expected
        assert learned(tokenizer, sample) == "A cat. A chart.<|endoftext|>"
        assert len(sample.images) == 2


def test_captions(tokenizer, folder):
    sample = encode(tokenizer, "captions", {"image": "small.png", "text": "A cat.", "category": "animals"}, folder)
    assert text_of(tokenizer, sample.token_ids).replace("<|img|>" * 4, "<|img|>") == f"{PICTURE}A cat.<|endoftext|>"
    assert learned(tokenizer, sample) == "A cat.<|endoftext|>"
    assert sample.category == "animals"


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("captions", {"image": "small.png"}, "no caption"),
        ("captions", {"image": "small.png", "caption": "  "}, "no text"),
        ("captions", {"caption": "A cat."}, "more image placeholders"),
        ("captions", {"images": ["small.png", "small.png"], "caption": "A cat."}, "fewer image placeholders"),
        ("interleaved", {"content": [{"image": "small.png"}]}, "no text"),
        ("interleaved", {"content": []}, "no content"),
        ("interleaved", {"texts": ["a"], "images": []}, "differ in length"),
    ],
)
def test_documents_without_something_to_learn(tokenizer, folder, format, record, reason):
    with pytest.raises(BadRecord) as failure:
        encode(tokenizer, format, record, folder)
    assert reason in failure.value.reason


def test_size_class_by_recipe_and_by_record(tokenizer, folder):
    record = {"image": "large.jpg", "text": "A cat."}
    assert encode(tokenizer, "captions", record, folder, image_size=56).placements[0].layout.size == 56
    record["image_size"] = 112
    assert encode(tokenizer, "captions", record, folder, image_size=56).placements[0].layout.size == 112


def test_split_images_take_a_run_per_crop(tokenizer, folder):
    record = {"image": "large.jpg", "text": "A cat."}
    sample = encode(tokenizer, "captions", record, folder, image_size=56, split_unit=56)
    (placement,) = sample.placements
    assert placement.layout.grid == (112, 168)
    assert placement.layout.num_crops == 6
    assert (sample.token_ids == 9).sum() == 6 * 4
    assert len(images.process(images.decode(sample.images[0]), placement.layout, VISION)) == 6


def test_a_tokenizer_for_another_model_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"<\|img\|> is token 9, but model.image_token_id is 10"):
        Encoder(recipe_for(tokenizer, "chat", model=MODEL.model_copy(update={"image_token_id": 10})))


def test_images_need_a_model_with_vision(tokenizer, folder):
    with pytest.raises(DataError, match="no model.vision section"):
        encode(tokenizer, "captions", {"image": "small.png", "text": "x"}, folder, model=ModelConfig(vocab_size=1024))
