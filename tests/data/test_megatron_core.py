"""Corpora go both ways between this package and megatron-core."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from aria_train.config import ModelConfig
from aria_train.data.text.corpus import TextSource
from aria_train.data.text.indexed import DTYPES, IndexedCorpus, IndexedWriter
from tests.data.corpora import random_documents, write_corpus

pytestmark = [
    pytest.mark.slow,  # Importing megatron-core is.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12], [13, 14]]


@pytest.fixture(scope="module")
def indexed_dataset() -> ModuleType:
    pytest.importorskip("megatron.core")
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [dtype.newbyteorder("=") for dtype in DTYPES.values()], ids=str)
def test_megatron_core_reads_ours(tmp_path: Path, dtype: np.dtype, indexed_dataset: ModuleType) -> None:
    theirs = indexed_dataset.IndexedDataset(str(write_corpus(tmp_path / "a", DOCUMENTS, dtype)))
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert theirs[3].dtype == dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32])
def test_ours_reads_megatron_core(
    tmp_path: Path, dtype: type[np.number], multimodal: bool, indexed_dataset: ModuleType
) -> None:
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype, multimodal=multimodal)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3], [0, 1])
    builder.add_item(torch.tensor([6]))
    builder.add_item(torch.tensor([7, 8]), mode=1)
    builder.end_document()
    builder.end_document()
    builder.add_document(torch.tensor([9, 10]), [2], [0])
    builder.finalize(str(tmp_path / "a.idx"))
    corpus = IndexedCorpus(tmp_path / "a")
    corpus.verify()
    assert [corpus.read(document).tolist() for document in range(4)] == [[1, 2, 3, 4, 5], [6, 7, 8], [], [9, 10]]
    assert corpus.document_lengths().tolist() == [5, 3, 0, 2]
    assert (None if corpus.modes is None else corpus.modes.tolist()) == ([0, 1, 0, 1, 0] if multimodal else None)


def test_files_are_byte_for_byte_those_of_megatron_core(tmp_path: Path, indexed_dataset: ModuleType) -> None:
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16, multimodal=True)
    with IndexedWriter(tmp_path / "b", np.uint16, with_modes=True) as writer:
        for lengths, modes in (([2, 3], [0, 1]), ([4], [1])):
            builder.add_document(torch.arange(sum(lengths)), lengths, modes)
            writer.add_document(np.arange(sum(lengths)), lengths, modes)
        builder.finalize(str(tmp_path / "a.idx"))
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_corpus_of_megatron_core_trains_unchanged(tmp_path: Path, indexed_dataset: ModuleType) -> None:
    documents = random_documents(50, 100)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for document in documents:
        half = len(document) // 2
        builder.add_item(torch.tensor(document[:half], dtype=torch.int64))
        builder.add_item(torch.tensor(document[half:], dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    source = TextSource("web", [tmp_path / "a"], 64, 0, ModelConfig(vocab_size=1024))
    targets = sorted(token for n in range(source.num_windows) for token in source.read(n).labels.tolist())
    assert targets == sorted(token for document in documents for token in document[1:])
