import argparse
import gzip
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from aria_train.data import commands
from aria_train.data.prepare import text as prepare_module
from aria_train.data.prepare.text import is_held_out
from aria_train.data.prepare.text_inputs import find_inputs, read_documents, split_into_units
from aria_train.data.text.indexed import IndexedCorpus
from aria_train.data.text.tokenizer import load_tokenizer, train_tokenizer
from aria_train.errors import DataError
from aria_train.machine import num_cpus

WORDS = ["quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "and", "nap", "in", "warm", "autumn", "sun"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "mine"
    train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 400, folder)
    return folder


def text(number: int) -> str:
    return f"document {number}: " + " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(number % 23 + 1))


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def run(output: Path | str, tokenizer: Path, /, *inputs: Path | str, **options: Any) -> None:
    defaults = {"text_key": "text", "glob": None, "holdout_fraction": 0.0, "processes": 1, "overwrite": False}
    given = {"output": str(output), "inputs": [str(path) for path in inputs], "tokenizer": str(tokenizer)}
    commands._prepare(argparse.Namespace(format="text", **{**given, **defaults, **options}))


def texts(prefix: Path | str, tokenizer: Path) -> list[str]:
    """Decoded documents; each must end with the end-of-document token and hold no other special one."""
    corpus, model = IndexedCorpus(prefix), load_tokenizer(tokenizer)
    documents = [corpus.read(number).tolist() for number in range(corpus.num_documents)]
    assert all(tokens[-1] == 2 and min(tokens[:-1]) >= 64 for tokens in documents)
    return [model.decode(tokens[:-1]) for tokens in documents]


def metadata(prefix: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text())
    return loaded


def test_json_lines_become_a_corpus_in_order(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_lines(tmp_path / "in" / "a.jsonl", [{"text": text(n), "other": n} for n in range(50)])
    run(tmp_path / "out" / "web", tokenizer, lines)
    assert texts(tmp_path / "out" / "web", tokenizer) == [text(n) for n in range(50)]
    corpus, about = IndexedCorpus(tmp_path / "out" / "web"), metadata(tmp_path / "out" / "web")
    assert corpus.dtype == "uint16"
    assert about["documents"] == 50
    assert about["tokens"] == corpus.num_tokens
    assert (about["vocabulary_size"], about["end_of_document_id"], about["skipped"]) == (400, 2, {})
    assert len(about["tokenizer_sha256"]) == 64
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["web.bin", "web.idx", "web.json"]


def test_every_kind_of_file_in_one_preparation(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in put"
    write_lines(folder / "1.jsonl", [{"text": text(1)}, {"text": text(2)}])
    with gzip.open(folder / "2.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text(3)}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [text(4), text(5)], "id": [1, 2]}), folder / "3.parquet")
    (folder / "4.md").write_text(text(6))
    (folder / "sub").mkdir()
    (folder / "sub" / "5.txt").write_bytes(b"\xef\xbb\xbf" + text(7).encode())
    (folder / "ignored.py").write_text("x")
    (folder / ".hidden.txt").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("x")
    run(tmp_path / "out", tokenizer, folder)
    assert texts(tmp_path / "out", tokenizer) == [text(n) for n in range(1, 8)]
    run(tmp_path / "py", tokenizer, folder, glob=["*.py"])
    assert texts(tmp_path / "py", tokenizer) == ["x"]
    run(tmp_path / "pattern", tokenizer, f"{tmp_path}/in*/*.jsonl", folder / "ignored.py", folder / "1.jsonl")
    assert texts(tmp_path / "pattern", tokenizer) == [text(1), text(2), "x"]


def test_another_key_or_column(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"content": "alpha"}])
    pyarrow.parquet.write_table(pyarrow.table({"content": ["beta"]}), tmp_path / "b.parquet")
    run(tmp_path / "out", tokenizer, lines, tmp_path / "b.parquet", text_key="content")
    assert texts(tmp_path / "out", tokenizer) == ["alpha", "beta"]


def test_text_cannot_forge_document_boundaries(tmp_path: Path, tokenizer: Path) -> None:
    forged = "one<|endoftext|>two <|img|>"
    run(tmp_path / "out", tokenizer, write_lines(tmp_path / "a.jsonl", [{"text": forged}]))
    assert texts(tmp_path / "out", tokenizer) == [forged]


def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SMALLEST_UNIT", 1)
    monkeypatch.setattr(prepare_module, "_LARGEST_UNIT", 700)


def test_the_result_does_not_depend_on_the_cutting(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"text": text(n)} if n % 13 else "not json" for n in range(300)]
    lines = write_lines(tmp_path / "a.jsonl", records)
    table = pyarrow.table({"text": [text(n) for n in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=20)
    inputs = [lines, tmp_path / "b.parquet"]
    run(tmp_path / "whole", tokenizer, *inputs)
    small_units(monkeypatch)
    run(tmp_path / "cut", tokenizer, *inputs)
    assert len(split_into_units([str(i) for i in inputs], 700)) > 30
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/whole{suffix}").read_bytes() == Path(f"{tmp_path}/cut{suffix}").read_bytes()


@pytest.mark.parametrize("unit_bytes", [1, 2, 3, 7, 50, 1000])
def test_byte_ranges_cut_lines_nowhere(tmp_path: Path, unit_bytes: int) -> None:
    records = [{"text": "é" * n} for n in range(1, 9)]
    path = write_lines(tmp_path / "a.jsonl", records)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    units = split_into_units([str(path)], unit_bytes)
    found = [item for unit in units for item in read_documents(unit, "text") if isinstance(item, str)]
    assert found == ["é" * n for n in range(1, 9)]


@pytest.mark.slow
def test_several_processes_make_the_same_corpus(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text(n)} if n % 13 else "{" for n in range(500)])
    run(tmp_path / "one", tokenizer, lines, holdout_fraction=0.2)
    small_units(monkeypatch)
    run(tmp_path / "many", tokenizer, lines, holdout_fraction=0.2, processes=3)
    for end in (".bin", ".idx", ".json", "_validation.bin", "_validation.idx", "_validation.json"):
        assert Path(f"{tmp_path}/one{end}").read_bytes() == Path(f"{tmp_path}/many{end}").read_bytes()


def test_the_holdout_is_chosen_by_the_document_alone(tmp_path: Path, tokenizer: Path) -> None:
    numbers = list(range(400))
    first = write_lines(tmp_path / "a.jsonl", [{"text": text(n)} for n in numbers])
    second = write_lines(tmp_path / "b.jsonl", [{"text": text(n)} for n in reversed(numbers)])
    run(tmp_path / "a", tokenizer, first, holdout_fraction=0.1)
    run(tmp_path / "b", tokenizer, second, first, holdout_fraction=0.1)
    train, held = texts(tmp_path / "a", tokenizer), texts(tmp_path / "a_validation", tokenizer)
    assert sorted([*train, *held]) == sorted(text(n) for n in numbers)
    assert 20 < len(held) < 70
    assert set(texts(tmp_path / "b_validation", tokenizer)) == set(held)
    assert len(texts(tmp_path / "b_validation", tokenizer)) == 2 * len(held)
    assert [metadata(tmp_path / name)["part"] for name in ("a", "a_validation")] == ["train", "validation"]
    assert not any(is_held_out(text(n), 0.0) for n in numbers)


def test_what_is_skipped_is_counted_and_named(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "a.jsonl"
    raw = [
        b'{"text": "good"}',
        b'{"text": ',
        b'{"text": "  "}',
        b'{"other": 1}',
        b"",
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b"[1]",
        b'{"text": "\\ud800"}',
        *[b"nope"] * 10,
        b'{"text": "last"}',
    ]
    lines.write_bytes(b"\n".join(raw))
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.txt")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "read"}\n' * 3000)[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "column.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None, ""]}), tmp_path / "null.parquet")
    small_units(monkeypatch)
    run(tmp_path / "out", tokenizer, tmp_path)
    found = texts(tmp_path / "out", tokenizer)
    assert {"good", "last", "fine", "read"} == set(found)
    skipped = metadata(tmp_path / "out")["skipped"]
    assert {reason: entry["documents"] for reason, entry in skipped.items()} == {
        "invalid JSON": 11,
        "empty document": 3,
        "no key 'text'": 1,
        "text is not a string": 2,
        "not UTF-8": 3,
        "not a JSON object": 1,
        "unreadable file": 3,
        "no column 'text'": 1,
    }
    example = skipped["invalid JSON"]["examples"]
    assert len(example) == 5
    assert example[0].startswith(f"{lines}:2 (")
    assert example[1].startswith(f"{lines}:10 (")
    assert f"{lines}:4 (keys: other)" in skipped["no key 'text'"]["examples"]
    assert f"{lines}:7 (byte 10 of the line)" in skipped["not UTF-8"]["examples"]
    assert f"{tmp_path}/null.parquet:1 (a NoneType)" in skipped["text is not a string"]["examples"]
    assert f"{tmp_path}/column.parquet (columns: words)" in skipped["no column 'text'"]["examples"]
    assert any("gone.txt (No such file" in place for place in skipped["unreadable file"]["examples"])
    assert any("torn.jsonl.gz:" in place for place in skipped["unreadable file"]["examples"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("invalid JSON", "11", "a.jsonl:2", "unreadable file"))


def test_zstandard_is_read_where_its_package_is_and_named_where_not(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ImportError:
        path.touch()
        with pytest.raises(DataError, match="needs the zstandard package: `pip install zstandard`"):
            run(tmp_path / "out", tokenizer, path)
        return
    frames = [zstandard.compress(json.dumps({"text": text(n)}).encode() + b"\n") for n in range(2)]
    path.write_bytes(b"".join(frames))
    run(tmp_path / "out", tokenizer, path)
    assert texts(tmp_path / "out", tokenizer) == [text(0), text(1)]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be prepared, and what stays when it fails


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout_fraction": 1.0}, "--holdout-fraction 1.0: must be at least 0 and below 1"),
        ({"processes": 0}, "--processes 0: must be 1 or more"),
        ({"inputs": ["/no/such.jsonl"]}, "/no/such.jsonl: no such file or folder"),
        ({"inputs": ["/no/*.jsonl"]}, "no file matches it as a pattern"),
        ({"glob": ["*.rst"], "inputs": None}, r"no file in this folder matches \*.rst"),
        ({"tokenizer": "/no/tokenizer"}, "no such tokenizer folder"),
        ({"text_key": "body"}, "no document could be made from 1 file.*2 x no key 'body', such as .*a.jsonl:1"),
        ({"holdout_fraction": 1e-9}, "of 2 documents none fell into the validation part.*larger fraction"),
        ({"holdout_fraction": 1 - 1e-9}, "of 2 documents none fell into the training part.*smaller fraction"),
        ({"output": "/proc/no/out"}, "/proc/no/out: cannot be written"),
    ],
)
def test_what_cannot_work_says_so_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, options: dict[str, Any], message: str
) -> None:
    lines = write_lines(tmp_path / "in" / "a.jsonl", [{"text": text(1)}, {"text": text(2)}])
    if "inputs" in options and options["inputs"] is None:
        options = {**options, "inputs": [str(tmp_path / "in")]}
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "out", tokenizer, lines, **options)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_an_existing_corpus_is_replaced_only_on_demand(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "new"}])
    run(tmp_path / "out", tokenizer, lines)
    with pytest.raises(DataError, match=r"out.idx: exists already.*--overwrite"):
        run(tmp_path / "out", tokenizer, lines)
    write_lines(lines, [{"text": "newer"}])
    run(tmp_path / "out", tokenizer, lines, overwrite=True)
    assert texts(tmp_path / "out", tokenizer) == ["newer"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("out.json", '{"my": "notes"}'), ("out.bin", "weights"), ("out.idx", "a list"), ("out_validation.json", "[]")],
)
def test_files_that_are_no_corpus_are_never_replaced(tmp_path: Path, tokenizer: Path, name: str, content: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text(n)} for n in range(50)])
    (tmp_path / name).write_text(content)
    for overwrite, message in ((False, "exists already"), (True, "is no part of a text corpus")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            run(tmp_path / "out", tokenizer, lines, holdout_fraction=0.5, overwrite=overwrite)
    assert (tmp_path / name).read_text() == content
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("output", ["folder/", ".", ".."])
def test_a_prefix_has_a_name(tmp_path: Path, tokenizer: Path, output: str) -> None:
    (tmp_path / "folder").mkdir()
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"not a prefix of file names. Give one, such as .*/train"):
        run(f"{tmp_path}/{output}", tokenizer, lines)
    assert not list((tmp_path / "folder").iterdir())


def test_held_out_documents_do_not_slip_into_training(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text(n)} for n in range(50)])
    run(tmp_path / "out", tokenizer, lines, holdout_fraction=0.5)
    with pytest.raises(DataError, match="was held out of .*out by an earlier preparation"):
        run(tmp_path / "out", tokenizer, lines, overwrite=True)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_failed_preparation_keeps_the_old_corpus_and_leaves_nothing_else(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text(n)} for n in range(50)])
    run(tmp_path / "out", tokenizer, lines)
    before = sorted(file.name for file in tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(prepare_module, "_publish", fail)
    with pytest.raises(failure):
        run(tmp_path / "out", tokenizer, lines, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert texts(tmp_path / "out", tokenizer) == [text(n) for n in range(50)]


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path, tokenizer: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    dead = tmp_path / f".out.preparing-{socket.gethostname()}-{process.pid}"
    alive = tmp_path / f".out.preparing-{socket.gethostname()}-{os.getppid()}"
    elsewhere = tmp_path / ".out.preparing-another-host-1"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
        (folder / "0.bin").touch()
    run(tmp_path / "out", tokenizer, write_lines(tmp_path / "a.jsonl", [{"text": "x"}]))
    assert [folder.exists() for folder in (dead, alive, elsewhere)] == [False, True, True]


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_no_hang(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "in" / "a.jsonl", [{"text": text(n)} for n in range(100)])
    small_units(monkeypatch)

    def kill(*_: object) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(prepare_module, "_move_part", kill)
    with pytest.raises(DataError, match="a worker process ended unexpectedly"):
        run(tmp_path / "out", tokenizer, lines, processes=2)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path / "sub"), str(tmp_path), str(tmp_path / "a.txt")], None)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["sub/c.txt", "a.txt", "b.txt"]


def test_cpus_are_counted_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cpus() == os.cpu_count()
