import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from aria_train.batch import IGNORE_LABEL
from aria_train.config import ModelConfig, SourceConfig, VisionConfig
from aria_train.data.text import corpus as text_module
from aria_train.data.text.corpus import TextSource, find_prefixes, open_source
from aria_train.errors import DataError
from tests.data.corpora import END, random_documents, run_config, write_corpus

MODEL = ModelConfig(vocab_size=1024)


def source(*prefixes: Path, context_length: int = 64, seed: int = 0, model: ModelConfig = MODEL) -> TextSource:
    return TextSource("web", prefixes, context_length, seed, model)


def pairs_of_windows(source: TextSource) -> Counter[tuple[int, int]]:
    """(input token, target token) over a whole epoch, with how often each occurs."""
    pairs: Counter[tuple[int, int]] = Counter()
    for position in range(source.num_windows):
        window = source.read(position)
        assert window.token_ids.dtype == window.labels.dtype == window.document_lengths.dtype == np.int32
        assert len(window.token_ids) == len(window.labels) == window.document_lengths.sum()
        pairs.update(zip(window.token_ids.tolist(), window.labels.tolist()))
    return pairs


def pairs_of_documents(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter(pair for document in documents for pair in itertools.pairwise(document))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_an_epoch_trains_every_token_but_the_first_of_each_document_once(tmp_path: Path, dtype: type) -> None:
    documents = [*random_documents(200, 50), *random_documents(5, 500, seed=1), [END], []]
    opened = source(write_corpus(tmp_path / "a", documents, dtype))
    assert pairs_of_windows(opened) == pairs_of_documents(documents)
    assert opened.plan.stats.without_targets == sum(len(document) < 2 for document in documents)


def test_a_window_holds_whole_documents(tmp_path: Path) -> None:
    documents = random_documents(100, 60)
    opened = source(write_corpus(tmp_path / "a", documents))
    whole = {tuple(document[:-1]) for document in documents}
    for position in range(opened.num_windows):
        window = opened.read(position)
        assert len(window.token_ids) <= 64
        assert IGNORE_LABEL not in window.labels
        for piece in np.split(window.token_ids, np.cumsum(window.document_lengths)[:-1]):
            assert tuple(piece.tolist()) in whole


def test_several_corpora_are_one_source(tmp_path: Path) -> None:
    parts = [random_documents(30, 80, seed=seed) for seed in range(3)]
    prefixes = [write_corpus(tmp_path / f"part{number}", part) for number, part in enumerate(parts)]
    everything = pairs_of_documents([document for part in parts for document in part])
    assert pairs_of_windows(source(*prefixes)) == everything
    assert find_prefixes([tmp_path]) == [str(prefix) for prefix in prefixes]
    assert find_prefixes([f"{prefixes[0]}.idx", prefixes[1]]) == [str(prefix) for prefix in prefixes[:2]]


def test_the_plan_is_kept_beside_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path / "a", random_documents(50, 80))
    first = source(prefix)
    assert len(list((tmp_path / "a.packing").iterdir())) == 1
    monkeypatch.setattr(text_module, "plan_documents", lambda *_: pytest.fail("planned again"))
    assert source(prefix).plan.stats == first.plan.stats
    assert find_prefixes([tmp_path]) == [str(prefix)]


@pytest.mark.parametrize("change", ["corpus", "context_length", "seed"])
def test_what_a_plan_depends_on_makes_another_plan(tmp_path: Path, change: str) -> None:
    prefix = write_corpus(tmp_path / "a", random_documents(50, 80))
    source(prefix)
    if change == "corpus":
        documents = random_documents(50, 80, seed=9)
        write_corpus(prefix, documents)
        os.utime(f"{prefix}.idx", ns=(1, 1))  # Clocks of some file systems are too coarse for a test.
        assert pairs_of_windows(source(prefix)) == pairs_of_documents(documents)
    else:
        source(prefix, **{change: 32})
    assert len(list((tmp_path / "a.packing").iterdir())) == 2


def test_a_read_only_corpus_has_its_plan_in_the_run_directory(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", random_documents(50, 80))
    (tmp_path / "a.packing").write_text("in the way, as a read-only folder would be")
    config = run_config(tmp_path / "run", {"web": prefix})
    opened = open_source(config.data.train[0], config)
    assert opened.num_windows > 0
    assert len(list((tmp_path / "run" / "packing").iterdir())) == 1


def test_the_same_position_is_the_same_window_after_the_plan_is_lost(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", random_documents(100, 80))
    before = [source(prefix).read(position).token_ids.tolist() for position in range(20)]
    shutil.rmtree(tmp_path / "a.packing")
    assert [source(prefix).read(position).token_ids.tolist() for position in range(20)] == before


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be trained on


def read_all(opened: TextSource) -> None:
    for position in range(opened.num_windows):
        opened.read(position)


@pytest.mark.parametrize(("dtype", "wrong"), [(np.uint16, 1024), (np.int32, -1), (np.int64, 2**40)])
def test_ids_outside_the_vocabulary_name_corpus_document_and_id(tmp_path: Path, dtype: type, wrong: int) -> None:
    documents = random_documents(20, 30)
    documents[7] = [5, 6, wrong, 7, END]
    opened = source(write_corpus(tmp_path / "a", documents, dtype))
    with pytest.raises(DataError, match=f"a: document 7 holds token id {wrong}, .* vocabulary is 0 to 1023"):
        read_all(opened)


def test_ids_are_checked_in_the_second_corpus_by_its_own_numbers(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / "a", random_documents(9, 9)), write_corpus(tmp_path / "b", [[5, 6], [5, 2000]])]
    with pytest.raises(DataError, match="b: document 1 holds token id 2000"):
        read_all(source(*prefixes))


def test_image_placeholders_in_text_are_refused_where_the_model_would_look_for_images(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[5, 9, 6, END]])
    read_all(source(prefix))
    with pytest.raises(DataError, match="document 0 holds the image placeholder, token id 9"):
        read_all(source(prefix, model=ModelConfig(vocab_size=1024, vision=VisionConfig())))


def test_a_corpus_of_floats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds float32 values, not token ids"):
        source(write_corpus(tmp_path / "a", [[1, 2, 3]], np.float32))


@pytest.mark.parametrize("documents", [[], [[]], [[END], [END], []]])
def test_a_corpus_without_targets_is_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match=f"holds {len(documents)} documents, none of them with two tokens"):
        source(write_corpus(tmp_path / "a", documents))


def test_a_corpus_made_for_a_larger_vocabulary_is_refused_on_opening(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", random_documents(5, 5))
    (tmp_path / "a.json").write_text('{"vocabulary_size": 2000}')
    with pytest.raises(DataError, match=r"tokenizer of 2,000 tokens, more than model.vocab_size 1,024"):
        source(prefix)
    for not_ours in ("[1]", "{", '{"vocabulary_size": "many"}'):
        (tmp_path / "a.json").write_text(not_ours)
        source(prefix)


def test_a_damaged_index_is_found_before_training(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[5, 6, END]] * 3)
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[34 + 12 : 34 + 20] = np.int64(10**6).tobytes()
    Path(f"{prefix}.idx").write_bytes(raw)
    with pytest.raises(DataError, match="sequence 0 has 3 tokens"):
        source(prefix)


def test_paths_that_hold_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this folder holds no corpus"):
        find_prefixes([tmp_path])
    with pytest.raises(DataError, match="is given twice"):
        find_prefixes(["data/a", "data/a.idx"])
    config = run_config(tmp_path, {"web": tmp_path / "missing"})
    with pytest.raises(DataError, match="source 'web': .*missing: no such corpus"):
        open_source(SourceConfig(name="web", path=str(tmp_path / "missing")), config)
