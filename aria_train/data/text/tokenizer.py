"""Tokenizers as Hugging Face folders: trained here, taken over, and loaded. Only JSON is read, never pickles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from aria_train.data.permutation import permute
from aria_train.data.prepare.report import Progress
from aria_train.data.prepare.skips import SkipReport, refuse_empty
from aria_train.data.prepare.text_inputs import Skipped, read_documents, split_into_units
from aria_train.errors import DataError
from aria_train.publish import refuse_existing, replacing

NUM_RESERVED = 64
"""Ids 0 to 63 are special tokens, so that those at Aria's published ids have room for more beside them."""
PUBLISHED_TOKENS = {
    0: "<unk>",
    1: "<|startoftext|>",
    2: "<|endoftext|>",
    6: "<|im_start|>",
    7: "<|im_end|>",
    9: "<|img|>",
    39: "<fim_prefix>",
    41: "<fim_suffix>",
}
SMALLEST_VOCABULARY = NUM_RESERVED + 256
"""Reserved tokens and one token per byte, with which any text can be written."""
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What a token may span at most."""
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer's folder may hold."""
_END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


def special_tokens() -> list[str]:
    """The 64 reserved tokens, in the order of their ids."""
    return [PUBLISHED_TOKENS.get(number, f"<|reserved_{number}|>") for number in range(NUM_RESERVED)]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path, overwrite: bool = False) -> Tokenizer:
    """Trains a byte-level BPE on `texts`, on all cores, and writes it to `folder`.

    Digits stand alone, a space joins the word after it, line ends stay together; every string can be encoded and comes
    back unchanged.
    Little or repetitive text may yield fewer than `vocab_size` tokens.
    """
    refuse_existing(folder, overwrite, "tokenizer", FILES)
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size {vocab_size}: a byte-level tokenizer needs at least {SMALLEST_VOCABULARY} tokens, the "
            f"{NUM_RESERVED} reserved ones and one per byte. Usual sizes are 8192 to 131072."
        )
    if vocab_size >= 2**31:
        raise DataError(f"--vocab-size {vocab_size}: token ids are numbers below 2^31. Usual sizes are 8192 to 131072.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for number, token in enumerate(special_tokens()):
        assert tokenizer.token_to_id(token) == number, f"{token} got id {tokenizer.token_to_id(token)}, not {number}"
    with replacing(folder, overwrite, "tokenizer", FILES) as workplace:
        tokenizer.save(str(workplace / "tokenizer.json"))
        (workplace / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 65536,
    }


def train_on_files(
    paths: Sequence[str], text_key: str, vocab_size: int, folder: str | Path, max_bytes: int, overwrite: bool = False
) -> Tokenizer:
    """`train_tokenizer` on the documents of files: all of them or, above `max_bytes`, parts picked all over them."""
    units = split_into_units(paths, 4 << 20)
    scattered = sorted(range(len(units)), key=lambda number: permute(number, len(units), "tokenizer"))
    num_bytes = np.cumsum([units[number].num_bytes for number in scattered])
    chosen = [units[number] for number in scattered[: int(np.searchsorted(num_bytes, max_bytes)) + 1]]
    skips, documents = SkipReport(), 0

    def texts() -> Iterator[str]:
        nonlocal documents
        for unit in chosen:
            for item in read_documents(unit, text_key):
                if isinstance(item, str):
                    documents += 1
                    yield item
                elif isinstance(item, Skipped):
                    # Lines are counted from the beginning of the unit, which may be amid a file.
                    skips.add(replace(item, line=None))
            progress.advance(unit.num_bytes, documents)
        refuse_empty({"": documents}, "document", paths, skips)

    with Progress(sum(unit.num_bytes for unit in chosen), "reading") as progress:
        return train_tokenizer(texts(), vocab_size, folder, overwrite)


def copy_tokenizer(source: str | Path, folder: str | Path, overwrite: bool = False) -> Tokenizer:
    """Checks a Hugging Face tokenizer folder and copies its files (JSON and merges only; no code, no pickles)."""
    tokenizer = load_tokenizer(source)
    end_of_document_id(source, tokenizer)
    with replacing(folder, overwrite, "tokenizer", FILES) as workplace:
        for name in FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, workplace / name)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads `tokenizer.json` of a Hugging Face tokenizer folder. Raises DataError saying what is wrong with it."""
    file = _tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a tokenizer: it is not UTF-8 text. Copy it again.") from None
    except Exception as error:  # The library raises bare Exception for anything it cannot parse.
        raise DataError(
            f"{file}: not a tokenizer that the `tokenizers` library reads: {error}. It may be damaged, or written by a "
            "newer version; save it again with transformers' save_pretrained."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_document_id(folder: str | Path, tokenizer: Tokenizer) -> int:
    """The token that ends a document: the folder's `eos_token`, else the first usual name in the vocabulary."""
    name = _read_config(folder).get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name is not None:
        number = tokenizer.token_to_id(name)
        if number is None:
            raise DataError(
                f"{folder}: eos_token {name!r} of tokenizer_config.json is not in the vocabulary. Mend either."
            )
        return int(number)
    for name in _END_NAMES:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return int(number)
    raise DataError(
        f"{folder}: the tokenizer has no token to end documents with: tokenizer_config.json names no eos_token, and "
        f"none of {', '.join(_END_NAMES)} is in the vocabulary. Name one as eos_token in tokenizer_config.json."
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_hash(folder: str | Path) -> str:
    """SHA-256 of `tokenizer.json`: the same tokenizer, wherever its folder lies."""
    return hashlib.sha256(_tokenizer_file(folder).read_bytes()).hexdigest()


def _tokenizer_file(folder: str | Path) -> Path:
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        return file
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such tokenizer folder. Give a Hugging Face tokenizer folder (with tokenizer.json), or train "
            "one: `aria-train data tokenizer FOLDER INPUT...`."
        )
    others = [
        name for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") if (folder / name).exists()
    ]
    raise DataError(
        f"{folder}: this folder has no tokenizer.json"
        + (
            f", only the slow format {others[0]}. Convert it once: "
            if others
            else ". To make one from another format: "
        )
        + "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)` in transformers."
    )


def _read_config(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}. Copy it again.") from None
    return config if isinstance(config, dict) else {}
