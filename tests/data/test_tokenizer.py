import json
import shutil
from pathlib import Path

import pytest

from aria_train.data.text import tokenizer as tokenizers_
from aria_train.data.text.tokenizer import PUBLISHED_TOKENS, load_tokenizer, train_on_files, train_tokenizer
from aria_train.errors import DataError

TEXTS = [Path(__file__).read_text(encoding="utf-8")] * 3
STRANGE = "def f(x):\n\treturn 1234.5  # naïve 漢字 🙂\r\n\r\n\x00 <|endoftext|><|img|>   end \u200d"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "mine"
    train_tokenizer(TEXTS, 500, path)
    return path


def test_reserved_tokens_have_the_published_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert {number: tokenizer.id_to_token(number) for number in PUBLISHED_TOKENS} == {
        0: "<unk>",
        1: "<|startoftext|>",
        2: "<|endoftext|>",
        6: "<|im_start|>",
        7: "<|im_end|>",
        9: "<|img|>",
        39: "<fim_prefix>",
        41: "<fim_suffix>",
    }
    assert tokenizer.id_to_token(63) == "<|reserved_63|>"
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[0] == 6
    assert len(tokenizer.id_to_token(64)) == 1
    assert tokenizers_.end_of_document_id(folder, tokenizer) == 2
    assert tokenizers_.vocabulary_size(tokenizer) == 500


def test_any_text_comes_back_unchanged(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(STRANGE).ids, skip_special_tokens=False) == STRANGE
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(STRANGE).ids
    assert tokenizer.decode(ids) == STRANGE
    assert min(ids) >= 64


def test_digits_stand_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.id_to_token(number) for number in tokenizer.encode("2024").ids] == ["2", "0", "2", "4"]


def test_transformers_loads_the_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(folder)
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(str(folder))
        assert theirs.encode(STRANGE) == ours.encode(STRANGE).ids
        assert theirs.decode(theirs.encode(STRANGE)) == STRANGE
        assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 1, 2, 0)
        assert len(theirs) == 500


def test_the_hash_names_the_tokenizer_not_the_folder(folder: Path, tmp_path: Path) -> None:
    tokenizers_.copy_tokenizer(folder, tmp_path / "copy")
    assert tokenizers_.tokenizer_hash(folder) == tokenizers_.tokenizer_hash(tmp_path / "copy")
    train_tokenizer(TEXTS, 501, tmp_path / "other")
    assert tokenizers_.tokenizer_hash(folder) != tokenizers_.tokenizer_hash(tmp_path / "other")


def test_taking_over_a_folder_copies_its_json_and_nothing_that_could_run(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    (theirs / "tokenization_custom.py").write_text("raise SystemExit")
    (theirs / "pytorch_model.bin").write_bytes(b"pickle")
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    tokenizers_.copy_tokenizer(theirs, tmp_path / "taken")
    names = sorted(file.name for file in (tmp_path / "taken").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("taken", [False, True])
def test_an_existing_folder_is_replaced_only_on_demand(folder: Path, tmp_path: Path, taken: bool) -> None:
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    (target / "added_tokens.json").write_text("{}")

    def make(overwrite: bool) -> None:
        if taken:
            tokenizers_.copy_tokenizer(folder, target, overwrite)
        else:
            train_tokenizer(TEXTS, 400, target, overwrite)

    with pytest.raises(DataError, match="exists already.*--overwrite"):
        make(overwrite=False)
    make(overwrite=True)
    load_tokenizer(target)
    assert not (target / "added_tokens.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["target"]
    (target / "precious").write_text("x")
    with pytest.raises(DataError, match="holds precious, which is no part of a tokenizer.*replaces a tokenizer and"):
        make(overwrite=True)
    assert (target / "precious").read_text() == "x"


def test_training_on_files_reads_them_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha " * 500)
    (tmp_path / "b.jsonl").write_text('{"text": "' + "omega " * 500 + '"}\n')
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    tokenizer = train_on_files(files, "text", 340, tmp_path / "t", max_bytes=10**9)
    assert [len(tokenizer.encode(f" {word}").ids) for word in ("alpha", "omega")] == [1, 1]


def test_training_on_part_of_much_text(tmp_path: Path) -> None:
    files = []
    for number in range(8):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text('{"text": "' + f"{'abcdefgh'[number] * 9} " * 300 + '"}\n')
    tokenizer = train_on_files(files, "text", 340, tmp_path / "t", max_bytes=6000)
    learned = [len(tokenizer.encode(f" {letter * 9}").ids) == 1 for letter in "abcdefgh"]
    assert 1 <= sum(learned) <= 3


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work


def test_too_small_or_large_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--vocab-size 1000+: token ids are numbers below 2\^31"):
        train_tokenizer(TEXTS, 10**20, tmp_path / "t")
    with pytest.raises(DataError, match="--vocab-size 319: a byte-level tokenizer needs at least 320"):
        train_tokenizer(TEXTS, 319, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": "x"}\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"no document could be made from 1 file.*no key 'text'"):
        train_on_files([str(tmp_path / "a.jsonl")], "text", 400, tmp_path / "t", 10**9)
    assert not (tmp_path / "t").exists()


def broken(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no tokenizer.json\. To make one"),
        (b"", "not a tokenizer that the `tokenizers` library reads"),
        (b"{}", "not a tokenizer that the `tokenizers` library reads"),
        (b"\x80\x04pickle", "it is not UTF-8 text"),
    ],
)
def test_what_is_not_a_tokenizer_is_refused(folder: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(broken(folder, tmp_path, "tokenizer.json", content))


def test_a_missing_folder_and_a_slow_tokenizer_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer folder.*aria-train data tokenizer"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(DataError, match=r"only the slow format tokenizer.model.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_the_end_of_a_document_is_what_the_folder_says(folder: Path, tmp_path: Path) -> None:
    def end(config: object) -> int:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return tokenizers_.end_of_document_id(copy, load_tokenizer(copy))

    assert end({"eos_token": "<|im_end|>"}) == 7
    assert end({"eos_token": {"content": "<|im_end|>"}}) == 7
    assert end({}) == 2
    with pytest.raises(DataError, match="eos_token '</s>' of tokenizer_config.json is not in the vocabulary"):
        end({"eos_token": "</s>"})
    with pytest.raises(DataError, match="tokenizer_config.json: not valid JSON"):
        end("{")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    (tmp_path / "t").mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "t" / "tokenizer.json"))
    with pytest.raises(DataError, match="no token to end documents with"):
        tokenizers_.copy_tokenizer(tmp_path / "t", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
