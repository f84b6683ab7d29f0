import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aria_train.cli import main
from aria_train.data.text.indexed import IndexedCorpus
from tests.data.corpora import random_documents, write_corpus


def test_from_files_to_a_described_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, corpus, lines = (str(tmp_path / name) for name in ("tokenizer", "corpus", "in.jsonl"))
    Path(lines).write_text("".join(json.dumps({"text": f"hello [bold] number {n}"}) + "\n" for n in range(40)))
    assert main(["data", "tokenizer", tokenizer, lines, "--vocab-size", "330"]) == 0
    assert "documents end with id 2. Set model.vocab_size to 330 or more" in capsys.readouterr().out
    assert main(["data", "tokenizer", f"{tokenizer}2", "--from", tokenizer]) == 0
    prepare = ["data", "prepare", corpus, lines, "--tokenizer", f"{tokenizer}2", "--processes", "1"]
    assert main([*prepare, "--holdout-fraction", "0.2"]) == 0
    made = IndexedCorpus(corpus).num_documents + IndexedCorpus(f"{corpus}_validation").num_documents
    assert made == 40
    capsys.readouterr()
    assert main(["data", "inspect", corpus, "--context-length", "64"]) == 0
    printed = capsys.readouterr().out
    assert "hello [bold] number" in printed
    assert "<|endoftext|>" in printed
    assert "windows of 64" in printed


def test_inspect_shows_ids_where_there_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "a", [[11, 12, 13], []])
    write_corpus(tmp_path / "b", random_documents(20, 40))
    assert main(["data", "inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "11 12 13" in printed
    assert "--tokenizer FOLDER decodes them" in printed
    assert str(tmp_path / "b") in printed.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "CORPUS", "--document", "9"], "--document 9: .* has documents 0 to 2"),
        (["inspect", "CORPUS", "--context-length", "0"], "--context-length 0: must be 1 or more"),
        (["inspect", "CORPUS", "--context-length", "1000000000000000000"], "and at most 16777216"),
        (["tokenizer", "out", "CORPUS.idx", "--max-bytes", "nan"], "--max-bytes nan: must be a number of bytes"),
        (["tokenizer", "out", "CORPUS.idx", "--max-bytes", "inf"], "--max-bytes inf: must be a number of bytes"),
        (["inspect", "nothing/here"], "no such corpus"),
        (["tokenizer", "out"], "give either INPUT files to train on, or --from"),
        (["tokenizer", "out", "in.txt", "--from", "tok"], "not both"),
        (["prepare", "out", "in.txt", "--tokenizer", "tok", "--processes", "1"], "in.txt: no such file"),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    corpus = str(write_corpus(tmp_path / "a", [[1, 2]] * 3))
    assert main(["data", *(corpus if argument == "CORPUS" else argument for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.strip().count("\n") == 0
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "tokenizer", "s3://b/x", "--from", "y"],
        ["data", "prepare", "s3://b/x", "y", "--tokenizer", "z"],
        ["data", "concatenate", "s3://b/x", "y"],
        ["data", "needles", "s3://b/x", "y", "--tokenizer", "z", "--documents", "1", "--max-tokens", "99"],
        ["import", "y", "s3://b/x"],
        ["export", "y", "s3://b/x"],
    ],
)
def test_nothing_is_written_to_a_url(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "s3://b/x: is a URL; only a path of this machine" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from aria_train.cli import main\n"
        "try: main(['data', 'prepare', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'pyarrow', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--holdout-fraction" in printed
    assert printed.splitlines()[-1] == "[]"
