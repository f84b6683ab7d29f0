"""Multimodal preparation: every format and kind of file becomes the right tokens, or one clear reason."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from aria_train.cli import main
from aria_train.config import ModelConfig, VisionConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.formats import BadRecord, Encoder, Recipe
from aria_train.data.multimodal.store import Reader, Sample
from aria_train.data.multimodal.video import sample_frames
from aria_train.data.prepare.multimodal import prepare_multimodal
from aria_train.data.text.tokenizer import load_tokenizer, train_tokenizer
from aria_train.errors import DataError

VISION = VisionConfig(patch_size=14, image_sizes={56: 4, 112: 16}, min_image_size=28, position_grid=8)
MODEL = ModelConfig(vocab_size=1024, vision=VISION)
PICTURE = "<fim_prefix><|img|><fim_suffix>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["user\nWhat is in the picture?\nassistant\nA digit, a chart and a cat.\n"] * 20, 400, folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with pictures of many kinds."""
    save(tmp_path / "small.png", 40, 30)
    save(tmp_path / "large.jpg", 300, 200)
    save(tmp_path / "strip.png", 1, 3000)
    noise(20, 20).convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise(20, 20).convert("P").save(tmp_path / "palette.png")
    noise(20, 20).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(tmp_path / "deep.png")
    noise(20, 20).save(tmp_path / "moving.gif", save_all=True, append_images=[noise(20, 20, 1)])
    (tmp_path / "text.png").write_text("not a picture\n")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "torn.png").write_bytes((tmp_path / "small.png").read_bytes()[:300])
    return tmp_path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, width: int, height: int) -> None:
    noise(width, height).save(path)


def recipe_for(tokenizer: str, format: str, **options) -> Recipe:
    loss = "assistant" if format == "chat" else "text"
    return replace(Recipe(tokenizer=tokenizer, model=MODEL, format=format, loss=loss), **options)


def encode(tokenizer: str, format: str, record: dict, folder: Path, **options) -> Sample:
    return Encoder(recipe_for(tokenizer, format, **options)).encode(record, f"{folder}/records.jsonl:1")


def text_of(tokenizer: str, ids) -> str:
    return load_tokenizer(tokenizer).decode([int(token) for token in ids], skip_special_tokens=False)


def learned(tokenizer: str, sample: Sample) -> str:
    return text_of(tokenizer, sample.token_ids[sample.loss == 1])


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def user(*items) -> dict:
    return {"role": "user", "content": [*items]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "text": None}


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


# ---------------------------------------------------------------------------------------------------------------------
# Video


def write_video(path: Path, frames: int = 20, rate: int = 5, width: int = 64, height: int = 48, turn: int = 0) -> None:
    """Frame i is grey of brightness 10 * i, its top half white when the video is marked as turned."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 6
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            pixels = np.full((height, width, 3), 10 * number, np.uint8)
            if turn:
                pixels[: height // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def brightness(frame: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(frame))).mean())


def test_frames_are_spread_uniformly(tmp_path):
    write_video(tmp_path / "video.mp4")
    frames = sample_frames(tmp_path / "video.mp4", 4, VISION)
    assert [round(brightness(frame) / 10) for frame in frames] == [2, 7, 12, 17]
    assert images.decode(frames[0]).size == (56, 42), "of the smallest class"
    assert frames == sample_frames(tmp_path / "video.mp4", 4, VISION)


def test_long_videos_are_sought_and_short_ones_give_each_frame_once(tmp_path):
    write_video(tmp_path / "long.mp4", frames=25, rate=1)
    frames = sample_frames(tmp_path / "long.mp4", 2, VISION)
    assert [round(brightness(frame) / 10) for frame in frames] == [6, 18]
    write_video(tmp_path / "short.mp4", frames=3)
    assert [round(brightness(f) / 10) for f in sample_frames(tmp_path / "short.mp4", 8, VISION)] == [0, 1, 2]


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write the mark")
def test_a_phone_held_upright_gives_upright_frames(tmp_path):
    write_video(tmp_path / "video.mp4", frames=4, turn=90)
    (frame,) = sample_frames(tmp_path / "video.mp4", 1, VISION)
    picture = np.asarray(images.decode(frame)).astype(int)
    assert picture.shape == (56, 42, 3)
    assert picture[:, :15].mean() > 200 > 60 > picture[:, -15:].mean(), "the top is at the left: a quarter turn"


def test_a_video_becomes_its_frames_as_images(tokenizer, folder):
    write_video(folder / "video.mp4")
    record = {
        "messages": [user({"type": "video", "text": None}, text("What?")), assistant("A cat.")],
        "video": {"path": "video.mp4", "num_frames": 3},
    }
    sample = encode(tokenizer, "chat", record, folder, image_size=112)
    shown = text_of(tokenizer, sample.token_ids).replace("<|img|>" * 4, "<|img|>")
    assert shown.startswith(f"<|im_start|>user\n{PICTURE * 3}What?")
    assert [placement.layout.size for placement in sample.placements] == [56] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def captions(folder: Path, count: int) -> list:
    """Captions in order, with a few that cannot be used at known lines."""
    records: list = [{"image": "small.png", "caption": f"A cat {n}."} for n in range(count)]
    records[3] = {"image": "no.png", "caption": "missing"}
    records[5] = "{not json"
    records[70] = {"image": "text.png", "caption": "broken"}
    return records


def test_a_corpus_does_not_depend_on_the_number_of_processes(tokenizer, folder):
    lines = write_lines(folder / "captions.jsonl", captions(folder, 200))
    made = []
    for processes in (1, 2):
        output = folder / f"made-{processes}"
        prepare_multimodal(output, [str(lines)], recipe_for(tokenizer, "captions"), processes, 0.2)
        reader, held_out = Reader(output), Reader(folder / f"made-{processes}_validation")
        assert len(reader) + len(held_out) == 197
        assert 15 < len(held_out) < 70
        skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert [(entry["line"], entry["reason"]) for entry in skipped] == [
            (4, "missing image"),
            (6, "invalid JSON"),
            (71, "broken image"),
        ]
        assert all(entry["path"] == str(lines) for entry in skipped)
        made.append([(reader.meta["fingerprint"], held_out.meta["fingerprint"])])
        samples = [reader.sample(row) for row in range(len(reader))]
        places = [int(sample.origin.rpartition(":")[2]) for sample in samples]
        assert places == sorted(places), "in the order of the input"
    assert made[0] == made[1]
    meta = json.loads((folder / "made-1" / "meta.json").read_text())
    assert meta["skipped"]["missing image"]["examples"] == [f"{lines}:4 ({folder / 'no.png'})"]
    assert meta["image_sizes"] == {"56": 4, "112": 16}
    assert meta["images"] == meta["samples"]
    assert meta["image_tokens"] == 4 * meta["samples"]
    assert meta["tokens"] == int(reader.lengths().sum())


def tables(folder: Path) -> dict[str, Path]:
    """The same two captioned images, stored in the ways tables of images are."""
    data = [(folder / name).read_bytes() for name in ("small.png", "cmyk.jpg")]
    struct = pa.array([{"bytes": b, "path": "a.png"} for b in data])
    columns = {"caption": ["A cat.", "A chart."], "id": [1, 2]}
    with_struct, with_bytes = pa.table({"image": struct, **columns}), pa.table({"image": data, **columns})
    with_paths = pa.table({"image": ["small.png", "cmyk.jpg"], **columns})
    pa.parquet.write_table(with_struct, folder / "struct.parquet", row_group_size=1)
    pa.parquet.write_table(with_bytes, folder / "bytes.parquet")
    pa.parquet.write_table(with_paths, folder / "paths.parquet")
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, with_struct.schema) as writer:
        writer.write_table(with_struct, max_chunksize=1)
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, with_bytes.schema) as writer:
        writer.write_table(with_bytes)
    lines = [{"image": "small.png", "caption": "A cat."}, {"image": "cmyk.jpg", "caption": "A chart."}]
    (folder / "list.json").write_text(json.dumps(lines))
    names = ("struct.parquet", "bytes.parquet", "paths.parquet", "stream.arrow", "file.arrow", "list.json")
    return {name: folder / name for name in names}


def test_tables_of_images_are_read_alike(tokenizer, folder):
    for name, path in tables(folder).items():
        output = folder / f"from-{name}"
        prepare_multimodal(output, [str(path)], recipe_for(tokenizer, "captions"))
        reader = Reader(output)
        assert [learned(tokenizer, reader.sample(row)) for row in (0, 1)] == [
            "A cat.<|endoftext|>",
            "A chart.<|endoftext|>",
        ]
        expected = [(folder / "small.png").read_bytes(), (folder / "cmyk.jpg").read_bytes()]
        assert [reader.sample(row).images[0] for row in (0, 1)] == expected
        first = 1 if name == "list.json" else 0
        assert reader.sample(1).origin == f"{path}:{first + 1}"


def test_conversations_in_a_table(tokenizer, folder):
    record = {
        "messages": [user(IMAGE, text("What?")), assistant("A cat.")],
        "images": [{"bytes": (folder / "small.png").read_bytes(), "path": None}],
    }
    pa.parquet.write_table(pa.Table.from_pylist([record]), folder / "chat.parquet")
    prepare_multimodal(folder / "out", [str(folder / "chat.parquet")], recipe_for(tokenizer, "chat"))
    assert learned(tokenizer, Reader(folder / "out").sample(0)) == "A cat.<|im_end|>\n"


def test_a_damaged_file_is_reported_and_the_others_are_read(tokenizer, folder, capsys):
    paths = [folder / "bad.parquet", tables(folder)["bytes.parquet"], folder / "bad.arrow", folder / "bad.json"]
    for path in (paths[0], paths[2], paths[3]):
        path.write_bytes(b"PAR1 nonsense")
    metadata = prepare_multimodal(folder / "out", [str(path) for path in paths], recipe_for(tokenizer, "captions"))
    assert metadata[""]["samples"] == 2
    assert metadata[""]["skipped"]["unreadable file"]["documents"] == 3
    assert "unreadable file" in capsys.readouterr().out


def test_nothing_usable_writes_nothing(tokenizer, folder):
    lines = write_lines(folder / "captions.jsonl", [{"image": "no.png", "caption": "x"}])
    with pytest.raises(DataError, match=r"no sample could be made.*1 x missing image, such as .*captions.jsonl:1"):
        prepare_multimodal(folder / "out", [str(lines)], recipe_for(tokenizer, "captions"))
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


CONFIG = """
stage: test
model:
  vocab_size: 1024
  vision: {patch_size: 14, image_sizes: {56: 4, 112: 16}, min_image_size: 28, position_grid: 8}
train: {max_steps: 1}
"""


def test_the_command_makes_a_corpus_once(tokenizer, folder, capsys):
    (folder / "stage.yaml").write_text(CONFIG)
    write_lines(folder / "captions.jsonl", [{"image": "small.png", "caption": "A cat."}] * 3)
    command = ["data", "prepare", str(folder / "out"), str(folder / "captions.jsonl"), "--tokenizer", tokenizer]
    command += ["--format", "captions", "--processes", "1", "--model-config", str(folder / "stage.yaml")]
    assert run(command) == 0
    assert len(Reader(folder / "out")) == 3
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*command, "--overwrite", "--image-size", "112"]) == 0
    assert Reader(folder / "out").meta["image_tokens"] == 48
    assert run([*command, "--overwrite", "--image-size", "490"]) == 2
    assert "--image-size 490: must be one of model.vision.image_sizes, which are [56, 112]" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run(command[:-2]) == 2
    assert "needs --model-config" in capsys.readouterr().err
    assert Reader(folder / "out").meta["image_tokens"] == 48, "what was there is unharmed"


def run(arguments: list[str]) -> int:
    try:
        return main(arguments) or 0
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_corpus_can_be_looked_into(tokenizer, folder, capsys):
    record = {"messages": [user(IMAGE, text("What [bold]?")), assistant("A cat.")], "images": ["large.jpg"]}
    lines = write_lines(folder / "chat.jsonl", [record])
    prepare_multimodal(folder / "out", [str(lines)], recipe_for(tokenizer, "chat"))
    capsys.readouterr()
    assert run(["data", "inspect", str(folder / "out"), "--context-length", "64"]) == 0
    shown = capsys.readouterr().out
    assert "image 1: 300 x 200" in shown
    assert "class 112, 16 tokens" in shown
    assert "<fim_prefix><|img|> x 16<fim_suffix>What [bold]?<|im_end|>" in shown
    assert run(["data", "inspect", str(folder / "out"), "--document", "1"]) == 2
