"""Multimodal preparation: every kind of file becomes a corpus, the same at any number of processes, or none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from aria_train.cli import main
from aria_train.data.multimodal.store import Reader
from aria_train.data.prepare.multimodal import prepare_multimodal
from aria_train.errors import DataError
from tests.data.records import IMAGE, assistant, learned, recipe_for, text, user, write_lines


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


def test_names_that_are_no_text_and_links_that_lead_nowhere(tokenizer, folder, capsys):
    odd = folder / os.fsdecode(b"\xe9.jsonl")
    write_lines(odd, [{"image": "small.png", "caption": "A cat."}, {"caption": "no image"}])
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    metadata = prepare_multimodal(
        folder / "out", [str(odd), str(folder / "gone.jsonl")], recipe_for(tokenizer, "captions")
    )
    assert metadata[""]["samples"] == 1
    assert Reader(folder / "out").sample(0).origin.endswith(r"\xe9.jsonl:1")
    skipped = [json.loads(line) for line in (folder / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped[0]["path"].endswith(r"\xe9.jsonl")
    assert skipped[1]["reason"] == "unreadable file"
    assert r"\xe9.jsonl:2" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("captions.jsonl", "is not a folder"),
        ("images", "holds large.jpg, which is no part of a corpus"),
        ("described", "holds no meta.json, as a corpus does"),
        (".", "not a name for a new folder"),
    ],
)
def test_what_is_no_corpus_is_never_replaced(tokenizer, folder, capsys, name, message):
    (folder / "stage.yaml").write_text(CONFIG)
    lines = write_lines(folder / "captions.jsonl", [{"image": "small.png", "caption": "A cat."}])
    (folder / "images").mkdir()
    shutil.copy(folder / "large.jpg", folder / "images")
    (folder / "described" / "packing").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    output = "." if name == "." else str(folder / name)
    command = ["data", "prepare", output, str(lines), "--tokenizer", tokenizer, "--format", "captions"]
    command += ["--processes", "1", "--model-config", str(folder / "stage.yaml"), "--overwrite"]
    assert run(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(folder.rglob("*")) == before


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
    (folder / "out" / "sub").mkdir()
    assert run([*command, "--overwrite"]) == 2
    assert "holds sub, which is no part of a corpus" in " ".join(capsys.readouterr().err.split())
    (folder / "out" / "sub").rmdir()
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
