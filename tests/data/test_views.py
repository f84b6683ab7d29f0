"""Sources by length, and captioned images joined into long sequences: while training and as a corpus."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aria_train.batch import IGNORE_LABEL
from aria_train.cli import main
from aria_train.config import RunConfig, SourceConfig
from aria_train.data.multimodal.corpus import MultimodalSource
from aria_train.data.multimodal.store import Reader
from aria_train.data.text.corpus import open_source
from aria_train.data.views import ConcatenatedReader, SelectedReader
from aria_train.errors import DataError
from tests.stages.recipe import (
    END,
    IMAGE,
    NEWLINE,
    PREFIX,
    SUFFIX,
    VISION,
    captions,
    conversations,
    make_sample,
    png,
    write_samples,
    write_text,
)
from tests.tiny import tiny_config


def opened(folder: Path, path: str, **options: Any) -> Any:
    """The source at a path under the given options, in windows of 100."""
    config: RunConfig = tiny_config(
        folder / "run",
        [{"name": "it", "path": path, **options}],
        model={"vision": VISION},
        train={"context_length": 100},
    )
    return open_source(config.data.train[0], config)


def documents(source: Any) -> list[tuple[int, ...]]:
    """Inputs of every document of every window."""
    found = []
    for position in range(source.num_windows):
        window = source.read(position)
        bounds = np.cumsum([0, *window.document_lengths])
        found += [tuple(window.token_ids[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# By length


def test_documents_of_some_length_alone_are_read(tmp_path: Path) -> None:
    path = write_text(tmp_path / "text", 80, 5, 90)
    everything = documents(opened(tmp_path, path))
    long = documents(opened(tmp_path, path, min_tokens=41))
    short = documents(opened(tmp_path, path, max_tokens=40))
    assert long
    assert short
    # A document of m tokens has m - 1 inputs.
    assert sorted(long) == sorted(document for document in everything if len(document) >= 40)
    assert sorted(short) == sorted(document for document in everything if len(document) < 40)


def test_samples_of_some_length_alone_are_read(tmp_path: Path) -> None:
    path = conversations(tmp_path / "chat")
    everything = documents(opened(tmp_path, path))
    some = documents(opened(tmp_path, path, min_tokens=15, max_tokens=25))
    assert sorted(some) == sorted(document for document in everything if 14 <= len(document) <= 24)
    assert 0 < len(some) < len(everything)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_nothing_of_that_length_is_one_error(tmp_path: Path, kind: str) -> None:
    path = write_text(tmp_path / "it", 20, 5, 30) if kind == "text" else conversations(tmp_path / "it")
    with pytest.raises(
        DataError, match=r"(none of them with two tokens or more and|none of its .* is within) min_tokens"
    ):
        opened(tmp_path, path, min_tokens=5000)


def test_bounds_that_exclude_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens 9 is above max_tokens 5"):
        SourceConfig(name="it", path="it", min_tokens=9, max_tokens=5)


# ---------------------------------------------------------------------------------------------------------------------
# Joined


def test_images_come_first_then_their_captions(tmp_path: Path) -> None:
    samples = [make_sample([(png(n, 14, 14 * (1 + n % 2)), False), (4 + n, True)], seed=n) for n in range(3)]
    reader = ConcatenatedReader(Reader(Path(write_samples(tmp_path / "c", samples, "captions"))), 3, 1000, seed=5)
    joined = reader.sample(0)
    order = [next(n for n in range(3) if samples[n].images[0] == image) for image in joined.images]
    assert sorted(order) == [0, 1, 2]
    queries = [samples[n].placements[0].layout.num_tokens for n in order]
    texts = [samples[n].token_ids[-(5 + n) : -1].tolist() for n in order]
    pictures = [token for count in queries for token in (PREFIX, *[IMAGE] * count, SUFFIX)]
    assert joined.token_ids.tolist() == [*pictures, *texts[0], NEWLINE, *texts[1], NEWLINE, *texts[2], END]
    assert joined.loss.tolist() == [0] * len(pictures) + [1] * (len(joined.token_ids) - len(pictures))
    assert [p.start for p in joined.placements] == [1, queries[0] + 3, queries[0] + queries[1] + 5]
    assert [p.layout.num_tokens for p in joined.placements] == queries
    assert reader.lengths().tolist() == [len(joined.token_ids)] == [reader.length(0)]
    assert reader.placements(0) == joined.placements


@pytest.mark.parametrize("count", [1, 4, "window"])
def test_every_sample_is_used_once(tmp_path: Path, count: Any) -> None:
    path = captions(tmp_path / "captions")
    reader = Reader(Path(path))
    joined = ConcatenatedReader(reader, count, 100, seed=0)
    found = [image for row in range(len(joined)) for image in joined.sample(row).images]
    assert sorted(found) == sorted(image for row in range(len(reader)) for image in reader.sample(row).images)
    if count != "window":
        assert [len(joined.sample(row).images) for row in range(len(joined))] == [count] * (60 // count)
    other = ConcatenatedReader(reader, count, 100, seed=1)
    assert [other.sample(row).images for row in range(len(other))] != [
        joined.sample(row).images for row in range(len(joined))
    ]


def test_a_window_is_filled_with_one_sequence(tmp_path: Path) -> None:
    source = opened(tmp_path, captions(tmp_path / "captions"), concatenate="window")
    for position in range(source.num_windows):
        window = source.read(position)
        assert len(window.document_lengths) == 1
        assert len(window.token_ids) <= 100
        learned = window.labels != IGNORE_LABEL
        # From the last marker on, every position predicts a caption's token.
        first = int(np.flatnonzero(window.token_ids == SUFFIX)[-1])
        assert learned.tolist() == [False] * first + [True] * (len(learned) - first)
        assert sum(image.num_queries for image in window.images) == (window.token_ids == IMAGE).sum()
    lengths = [len(source.read(position).token_ids) for position in range(source.num_windows - 1)]
    assert np.mean(lengths) > 85


def test_the_prepared_corpus_is_the_source_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = captions(tmp_path / "captions")
    arguments = ["data", "concatenate", str(tmp_path / "long"), path, "--context-length", "100", "--seed", "3"]
    assert main(arguments) == 0
    assert "60 images" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    while_training = opened(tmp_path, path, concatenate="window")
    prepared = opened(tmp_path, str(tmp_path / "long"))
    assert isinstance(prepared, MultimodalSource)
    assert sorted(documents(prepared)) == sorted(documents(while_training))
    assert Reader(tmp_path / "long").meta["format"] == "long"


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_other_corpora_cannot_be_joined(tmp_path: Path, kind: str) -> None:
    path = write_text(tmp_path / "it", 20, 5, 30) if kind == "text" else conversations(tmp_path / "it")
    with pytest.raises(DataError, match="`concatenate` joins captioned images"):
        opened(tmp_path, path, concatenate=4)


def test_views_pile_up(tmp_path: Path) -> None:
    reader = Reader(Path(captions(tmp_path / "captions")))
    short = SelectedReader(reader, None, 12)
    joined = ConcatenatedReader(short, 5, 1000, seed=0)
    assert 0 < len(short) < len(reader)
    assert sum(len(joined.sample(row).images) for row in range(len(joined))) == len(short)
    assert short.meta["fingerprint"] != reader.meta["fingerprint"] != joined.meta["fingerprint"]


def test_text_sources_by_length_have_plans_of_their_own(tmp_path: Path) -> None:
    """A corpus remembers how it was packed: not one source's packing for the other."""
    path = write_text(tmp_path / "text", 80, 5, 90)
    everything, long = documents(opened(tmp_path, path)), documents(opened(tmp_path, path, min_tokens=41))
    assert len(long) < len(everything)
    assert documents(opened(tmp_path, path)) == everything
    assert documents(opened(tmp_path, path, min_tokens=41)) == long


def test_what_is_in_a_view_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = captions(tmp_path / "captions")
    options: list[dict[str, Any]] = [
        {"max_tokens": 12},
        {"concatenate": 3},
        {"max_tokens": 12, "concatenate": "window"},
    ]
    expected = [documents(opened(tmp_path, path, **chosen)) for chosen in options]
    assert len({str(found) for found in expected}) == 3

    def refuse(reader: Reader) -> Any:
        raise AssertionError("all lengths are read again")

    monkeypatch.setattr(Reader, "lengths", refuse)
    assert [documents(opened(tmp_path, path, **chosen)) for chosen in options] == expected
    with pytest.raises(AssertionError):
        opened(tmp_path, path, max_tokens=13)
