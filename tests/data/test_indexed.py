from pathlib import Path

import numpy as np
import pytest

from aria_train.data.text.indexed import DTYPES, HEADER_BYTES, IndexedCorpus, IndexedWriter, token_dtype
from aria_train.errors import DataError
from tests.data.corpora import write_corpus

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12], [13, 14]]


def contents(corpus: IndexedCorpus) -> list[list[int]]:
    return [corpus.read(document).tolist() for document in range(corpus.num_documents)]


@pytest.mark.parametrize("dtype", [dtype.newbyteorder("=") for dtype in DTYPES.values()], ids=str)
def test_what_is_written_is_read_in_every_dtype(tmp_path: Path, dtype: np.dtype) -> None:
    corpus = IndexedCorpus(write_corpus(tmp_path / "a", DOCUMENTS, dtype))
    corpus.verify()
    assert corpus.dtype == dtype
    assert contents(corpus) == DOCUMENTS
    assert corpus.document_lengths().tolist() == [3, 0, 1, 4, 2]
    assert corpus.lengths_of(np.array([4, 1, 0, 4])).tolist() == [2, 0, 3, 2]
    assert corpus.num_tokens == 10


def test_part_of_a_document_of_many_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document(range(10), [3, 0, 4, 3])
        writer.finish()
    corpus = IndexedCorpus(tmp_path / "a")
    assert corpus.read(0, 2, 8).tolist() == [2, 3, 4, 5, 6, 7]
    assert corpus.read(0, 8).tolist() == [8, 9]
    assert corpus.lengths_of(np.array([0, 0])).tolist() == [10, 10]


def test_sequences_need_not_lie_in_order(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document(range(6), [2, 2, 2])
        writer.finish()
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    pointers = HEADER_BYTES + 4 * 3
    raw[pointers : pointers + 16] = np.array([8, 0], np.int64).tobytes()
    (tmp_path / "a.idx").write_bytes(raw)
    corpus = IndexedCorpus(tmp_path / "a")
    corpus.verify()
    assert corpus.read(0).tolist() == [2, 3, 0, 1, 4, 5]


def test_corpora_append(tmp_path: Path) -> None:
    parts = [IndexedCorpus(write_corpus(tmp_path / str(number), DOCUMENTS)) for number in range(3)]
    with IndexedWriter(tmp_path / "all", np.uint16) as writer:
        for part in parts:
            writer.add_corpus(part)
        writer.finish()
    whole = IndexedCorpus(tmp_path / "all")
    whole.verify()
    assert contents(whole) == DOCUMENTS * 3


def test_a_corpus_without_documents_is_legal(tmp_path: Path) -> None:
    corpus = IndexedCorpus(write_corpus(tmp_path / "a", []))
    corpus.verify()
    assert (corpus.num_documents, corpus.num_tokens, len(corpus.document_lengths())) == (0, 0, 0)


def test_a_failed_writer_leaves_nothing_and_keeps_the_old_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)

    def fail() -> None:
        with IndexedWriter(tmp_path / "a", np.uint16) as writer:
            writer.add_document([1])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert contents(IndexedCorpus(tmp_path / "a")) == DOCUMENTS


def test_ids_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer, pytest.raises(AssertionError, match="70000"):
        writer.add_document([1, 70000])


def test_the_smallest_dtype_that_holds_a_vocabulary() -> None:
    sizes = {256: "uint8", 257: "uint16", 65536: "uint16", 65537: "int32", 100352: "int32"}
    assert {size: token_dtype(size).name for size in sizes} == sizes


def test_a_path_may_carry_either_suffix(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a.b", DOCUMENTS)
    assert contents(IndexedCorpus(f"{prefix}.idx")) == contents(IndexedCorpus(f"{prefix}.bin")) == DOCUMENTS


# What can be wrong with files. Each case: (file to damage, what is done to its bytes, what the message says).
DAMAGE = {
    "idx cut short": (".idx", lambda raw: raw[:-1], "truncated or damaged"),
    "idx too long": (".idx", lambda raw: raw + b"\0", "truncated or damaged"),
    "idx within the header": (".idx", lambda raw: raw[:20], "not an index of a Megatron corpus"),
    "idx empty": (".idx", lambda raw: b"", "not an index of a Megatron corpus"),
    "idx of another format": (".idx", lambda raw: b"X" + raw[1:], "not an index of a Megatron corpus"),
    "idx of another version": (".idx", lambda raw: raw[:9] + b"\2" + raw[10:], "format version 2"),
    "idx with an unknown dtype": (".idx", lambda raw: raw[:17] + b"\x63" + raw[18:], "dtype code 99"),
    "idx with absurd counts": (".idx", lambda raw: raw[:18] + b"\xff" * 16 + raw[34:], "promises"),
    "bin cut short": (".bin", lambda raw: raw[:-2], "holds 18 bytes"),
    "bin too long": (".bin", lambda raw: raw + b"\0\0", "holds 22 bytes"),
    "bin empty": (".bin", lambda raw: b"", "holds 0 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_on_opening(tmp_path: Path, case: str) -> None:
    suffix, damage, message = DAMAGE[case]
    file = Path(f"{write_corpus(tmp_path / 'a', DOCUMENTS)}{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        IndexedCorpus(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)
    assert "\n" not in str(error.value)


def overwrite(file: Path, offset: int, value: np.generic) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset : offset + value.nbytes] = value.tobytes()
    file.write_bytes(raw)


POINTERS, INDICES = HEADER_BYTES + 4 * 5, HEADER_BYTES + 12 * 5


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (POINTERS, np.int64(10**6), "sequence 0 has 3 tokens"),
        (POINTERS, np.int64(-2), "sequence 0 has 3 tokens"),
        (HEADER_BYTES + 4, np.int32(-1), "sequence 1 has -1 tokens"),
        (HEADER_BYTES + 12, np.int32(10**6), "sequence 3 has 1,000,000 tokens"),
        (INDICES + 8, np.int64(4), "document 1 ends before it begins"),
    ],
)
def test_damage_inside_the_index_is_found_by_verify(
    tmp_path: Path, offset: int, value: np.generic, message: str
) -> None:
    overwrite(Path(f"{write_corpus(tmp_path / 'a', DOCUMENTS)}.idx"), offset, value)
    with pytest.raises(DataError, match=message):
        IndexedCorpus(tmp_path / "a").verify()


def test_a_pointer_past_the_end_is_found_on_reading(tmp_path: Path) -> None:
    overwrite(Path(f"{write_corpus(tmp_path / 'a', DOCUMENTS)}.idx"), POINTERS, np.int64(10**6))
    with pytest.raises(DataError, match="outside a.bin"):
        IndexedCorpus(tmp_path / "a").read(0)


@pytest.mark.parametrize("value", [np.int64(4), np.int64(6)])
def test_documents_that_do_not_cover_all_sequences(tmp_path: Path, value: np.int64) -> None:
    overwrite(Path(f"{write_corpus(tmp_path / 'a', DOCUMENTS)}.idx"), INDICES + 8 * 5, value)
    with pytest.raises(DataError, match="not 0 to 5"):
        IndexedCorpus(tmp_path / "a")


def test_a_missing_corpus_names_the_nearest_one(tmp_path: Path) -> None:
    write_corpus(tmp_path / "wikipedia", DOCUMENTS)
    with pytest.raises(DataError, match="did you mean .*wikipedia.*those in that folder: wikipedia"):
        IndexedCorpus(tmp_path / "wikipedai")
    with pytest.raises(DataError, match="folder .* does not exist"):
        IndexedCorpus(tmp_path / "no" / "such")
    Path(tmp_path / "wikipedia.bin").unlink()
    with pytest.raises(DataError, match="wikipedia.bin is not in"):
        IndexedCorpus(tmp_path / "wikipedia")
