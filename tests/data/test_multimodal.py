"""Windows of multimodal corpora: images stay whole, windows equal a plain computation, damage does no harm."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aria_train.batch import IGNORE_LABEL
from aria_train.config import ModelConfig, RunConfig, SourceConfig, TrainConfig, VisionConfig
from aria_train.data.loader import pack_windows
from aria_train.data.multimodal import images
from aria_train.data.multimodal.corpus import MultimodalSource, cut_points
from aria_train.data.multimodal.store import Placement, Reader, Sample, Writer
from aria_train.data.text.corpus import open_source
from aria_train.errors import DataError

VISION = VisionConfig(patch_size=14, image_sizes={28: 3, 56: 7}, min_image_size=14, position_grid=8)
IMAGE, PREFIX, SUFFIX, END = 9, 39, 41, 2


def png(width: int = 20, height: int = 30, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SMALL, LARGE, SPLIT = png(20, 28, 1), png(50, 20, 2), png(150, 50, 3)


def run_config(folder: Path, context_length: int = 64, model: dict | None = None) -> RunConfig:
    model = {"vocab_size": 1_000_000, "vision": VISION, **(model or {})}
    train = TrainConfig(context_length=context_length, max_steps=1, run_dir=str(folder / "run"))
    return RunConfig(stage="test", model=ModelConfig(**model), train=train)


def make_sample(parts: list[bytes | int], fresh: itertools.count, origin: str = "here") -> Sample:
    """A document of stretches of text (their lengths) and images. Text tokens are numbered, so each occurs once."""
    tokens: list[int] = []
    placements: list[Placement] = []
    for part in parts:
        if isinstance(part, int):
            tokens += [next(fresh) for _ in range(part)]
            continue
        layout = images.layout_of(*images.read_size(part), VISION, split_unit=28)
        placements.append(Placement(len(tokens) + 1, layout))
        tokens += [PREFIX, *[IMAGE] * layout.num_tokens, SUFFIX]
    token_ids = np.array([*tokens, next(fresh)], np.int32)
    loss = (token_ids >= 100).astype(np.uint8)
    files = [part for part in parts if isinstance(part, bytes)]
    return Sample(token_ids, loss, files, placements, "documents", origin)


def write(folder: Path, samples: list[Sample], **details) -> Path:
    sizes = {str(size): queries for size, queries in VISION.image_sizes.items()}
    with Writer(folder) as writer:
        for sample in samples:
            writer.add(sample)
        writer.close(**{"divisible": True, "image_token_id": IMAGE, "image_sizes": sizes, **details})
    return folder


def open_it(folder: Path, context_length: int = 64, **model) -> MultimodalSource:
    return MultimodalSource(SourceConfig(name="pictures", path=str(folder)), run_config(folder, context_length, model))


def documents_of(source: MultimodalSource):
    """(token_ids, labels, images) of every document of every window."""
    for position in range(source.num_windows):
        window = source.read(position)
        assert len(window.token_ids) == len(window.labels) == window.document_lengths.sum()
        left = list(window.images)
        bounds = np.cumsum([0, *window.document_lengths])
        for start, end in itertools.pairwise(bounds):
            tokens, mine = window.token_ids[start:end], []
            while sum(image.num_queries for image in mine) < (tokens == IMAGE).sum():
                mine.append(left.pop(0))
            assert sum(image.num_queries for image in mine) == (tokens == IMAGE).sum()
            yield tokens, window.labels[start:end], mine
        assert not left


# ---------------------------------------------------------------------------------------------------------------------
# Windows


PARTS = st.lists(st.one_of(st.integers(1, 30), st.sampled_from([SMALL, LARGE, SPLIT])), max_size=7)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(PARTS, min_size=1, max_size=8), context_length=st.integers(8, 70), divisible=st.booleans())
def test_windows_equal_a_plain_computation_and_images_stay_whole(documents, context_length, divisible):
    fresh = itertools.count(100)
    samples = [make_sample([5, *parts], fresh) for parts in documents]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "corpus", samples, divisible=divisible)
        try:
            source = open_it(Path(folder) / "corpus", context_length)
        except DataError:
            assert all(len(sample.token_ids) - 1 > context_length for sample in samples)
            return
        pieces = list(documents_of(source))
        windows = [source.read(position) for position in range(source.num_windows)]
    assert all(len(window.token_ids) <= context_length for window in windows)
    # Text tokens are unique and every piece has one, or is an image between its markers: find where each belongs.
    owner = {int(t): (s, at) for s, sample in enumerate(samples) for at, t in enumerate(sample.token_ids) if t >= 100}
    covered: list[list[tuple[int, int]]] = [[] for _ in samples]
    for tokens, labels, processed in pieces:
        known = [at for at, token in enumerate(tokens) if token >= 100]
        if not known:  # a piece of images alone
            assert (tokens[0], tokens[-1]) == (PREFIX, SUFFIX)
            assert (labels[:-1] == IGNORE_LABEL).all()
            continue
        number, place = owner[int(tokens[known[0]])]
        sample, start = samples[number], place - known[0]
        end = start + len(tokens)
        covered[number].append((start, end))
        np.testing.assert_array_equal(tokens, sample.token_ids[start:end])
        for label, token, learned in zip(labels, sample.token_ids[start + 1 :], sample.loss[start + 1 :]):
            assert label == (token if learned else IGNORE_LABEL)
        expected = [
            crop
            for placement, data in zip(sample.placements, sample.images, strict=True)
            if start <= placement.start < end
            for crop in images.process(images.decode(data), placement.layout, VISION)
        ]
        for placement in sample.placements:
            whole = start <= placement.start - 1 and placement.end < end
            assert whole or placement.end < start or placement.start - 1 >= end, "an image is whole or absent"
        assert len(processed) == len(expected)
        for got, wanted in zip(processed, expected, strict=True):
            np.testing.assert_array_equal(got.patches, wanted.patches)
            np.testing.assert_array_equal(got.position_ids, wanted.position_ids)
            assert got.num_queries == wanted.num_queries
    left_out = used = 0
    for sample, bounds in zip(samples, covered, strict=True):
        positions = len(sample.token_ids) - 1
        if positions <= context_length:
            assert bounds == [(0, positions)], "a sample that fits is never split"
            used += positions
        elif not bounds:
            largest = max((p.layout.num_tokens + 2 for p in sample.placements), default=0)
            assert not divisible or largest > context_length
            left_out += 1
        else:
            assert divisible
            used += positions
    assert source.left_out == left_out
    assert sum(len(tokens) for tokens, _, _ in pieces) == used, "nothing is dropped or repeated"


@given(
    stretches=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=12),
    tail=st.integers(0, 30),
    length=st.integers(1, 40),
)
def test_cut_points_tile_and_keep_stretches_whole(stretches, tail, length):
    whole, at = [], 0
    for gap, size in stretches:
        whole.append((at + gap, at + gap + size))
        at += gap + size
    pieces = cut_points(at + tail, whole, length)
    if not pieces:
        assert at + tail == 0 or max((end - start for start, end in whole), default=0) > length
        return
    assert pieces[0][0] == 0
    assert pieces[-1][1] == at + tail
    for (start, end), (following, _) in itertools.pairwise([*pieces, (at + tail, 0)]):
        assert 0 < end - start <= length
        assert end == following
        assert not any(first < end < behind for first, behind in whole)


def test_windows_are_the_same_every_time_and_from_every_thread(tmp_path):
    fresh = itertools.count(100)
    folder = write(tmp_path / "corpus", [make_sample([4, SMALL, 9, LARGE, i % 7 + 1], fresh) for i in range(40)])
    source, again = open_it(folder), open_it(folder)
    assert source.num_windows == again.num_windows > 10
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, list(range(source.num_windows)) * 3))
    for position, window in enumerate(found):
        expected = again.read(position % source.num_windows)
        np.testing.assert_array_equal(window.token_ids, expected.token_ids)
        np.testing.assert_array_equal(window.labels, expected.labels)
        for image, same in zip(window.images, expected.images, strict=True):
            np.testing.assert_array_equal(image.patches, same.patches)


def test_micro_batch_holds_the_images_in_order(tmp_path):
    fresh = itertools.count(100)
    folder = write(tmp_path / "corpus", [make_sample([4, SMALL, 9, SPLIT], fresh), make_sample([60], fresh)])
    source = open_source(SourceConfig(name="pictures", path=str(folder)), run_config(tmp_path))
    windows = [source.read(position) for position in range(source.num_windows)]
    batch = pack_windows(windows, [0] * len(windows))
    assert batch.images is not None
    assert sum(batch.images.num_queries) == int((batch.token_ids == IMAGE).sum())
    assert batch.images.starts.tolist()[-1] == len(batch.images.patches) == len(batch.images.position_ids)
    processed = [image for window in windows for image in window.images]
    assert batch.images.num_queries == [image.num_queries for image in processed]


def test_text_only_conversations_need_no_vision(tmp_path):
    folder = write(tmp_path / "corpus", [make_sample([20], itertools.count(100))], divisible=False)
    assert open_it(folder, vision=None).read(0).images == []


def test_image_tokens_and_markers_are_no_targets(tmp_path):
    folder = write(tmp_path / "corpus", [make_sample([SMALL], itertools.count(100))])
    window = open_it(folder).read(0)
    assert (window.labels != IGNORE_LABEL).sum() == 1, "the end of the document"


# ---------------------------------------------------------------------------------------------------------------------
# Too long


def test_long_conversations_are_left_out_and_counted(tmp_path, caplog):
    fresh = itertools.count(100)
    folder = write(tmp_path / "corpus", [make_sample([n], fresh) for n in (30, 200, 40, 90)], divisible=False)
    with caplog.at_level(logging.WARNING):
        source = open_it(folder)
    assert source.left_out == 2
    assert "2 of 4 samples" in caplog.text
    assert "201 tokens" in caplog.text


def test_of_several_ranks_the_first_tells_what_is_left_out(tmp_path, caplog, monkeypatch):
    fresh = itertools.count(100)
    folder = write(tmp_path / "corpus", [make_sample([n], fresh) for n in (30, 200)], divisible=False)
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        assert open_it(folder).left_out == 1
    assert not caplog.text


def test_nothing_fits_is_one_error(tmp_path):
    folder = write(tmp_path / "corpus", [make_sample([100], itertools.count(100))], divisible=False)
    with pytest.raises(DataError, match=r"none of its 1 samples fits a window of 64 tokens.*the longest has 101"):
        open_it(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Broken images


def test_a_broken_image_costs_its_sample_alone(tmp_path, caplog):
    def corpus(at: Path, second: bytes) -> MultimodalSource:
        fresh = itertools.count(100)
        samples = [make_sample([10, SMALL, 5], fresh, f"file:{n}") for n in range(3)]
        samples[1] = Sample(**{**vars(samples[1]), "images": [second]})
        return open_it(write(at, samples))

    whole, broken = corpus(tmp_path / "whole", SMALL), corpus(tmp_path / "broken", SMALL[:60])
    with caplog.at_level(logging.WARNING):
        damaged = [list(documents_of(broken)) for _ in range(2)]
    assert caplog.text.count("cannot") + caplog.text.count("A blank stands in") == 1, "said once"
    assert "file:1" in caplog.text
    assert broken.broken_images == 1
    by_token = {int(tokens[0]): (tokens, labels, found) for tokens, labels, found in documents_of(whole)}
    differing = 0
    for (tokens, labels, found), (_, same_labels, _) in zip(*damaged, strict=True):
        expected_tokens, expected_labels, expected_found = by_token[int(tokens[0])]
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_array_equal(labels, same_labels)
        assert [image.num_queries for image in found] == [image.num_queries for image in expected_found]
        if not np.array_equal(labels, expected_labels):
            differing += 1
            assert (labels == IGNORE_LABEL).all()
            assert (found[0].patches == 0).all()
    assert differing == 1


# ---------------------------------------------------------------------------------------------------------------------
# Corpora that do not fit the model, or are not whole


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vision": None}, "no vision encoder"),
        ({"image_token_id": 10}, "marks images with token id 9, but model.image_token_id is 10"),
        ({"vocab_size": 110}, r"holds token id 1\d\d, but the model's vocabulary is 0 to 109"),
        ({"vision": VISION.model_copy(update={"image_sizes": {28: 4, 56: 7}})}, "was prepared for image sizes"),
    ],
)
def test_a_corpus_for_another_model_is_refused(tmp_path, model, message):
    folder = write(tmp_path / "corpus", [make_sample([20, SMALL], itertools.count(100))])
    with pytest.raises(DataError, match=message) as failure:
        open_it(folder, **model)
    assert "source 'pictures'" in str(failure.value)


def test_a_model_with_more_size_classes_reads_it(tmp_path):
    folder = write(tmp_path / "corpus", [make_sample([20, SMALL], itertools.count(100))])
    assert open_it(folder, vision=VISION.model_copy(update={"image_sizes": {28: 3, 56: 7, 112: 9}})).num_windows == 1


def test_a_torn_corpus_is_refused(tmp_path):
    folder = write(tmp_path / "corpus", [make_sample([20, SMALL], itertools.count(100))])
    shard = folder / "samples-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(DataError, match="The corpus is incomplete"):
        open_it(folder)
    shard.write_bytes(b"\0" * len(data))
    with pytest.raises(DataError, match="not readable as Arrow"):
        open_it(folder)
    shard.unlink()
    with pytest.raises(DataError, match="no such file"):
        open_it(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_it(folder)
    (folder / "meta.json").write_text(json.dumps({"kind": "text"}))
    with pytest.raises(DataError, match="does not describe a multimodal corpus"):
        open_it(folder)


def test_token_ids_that_do_not_match_their_images_are_refused(tmp_path):
    sample = make_sample([20, SMALL], itertools.count(100))
    sample.token_ids[3] = IMAGE
    source = open_it(write(tmp_path / "corpus", [sample]))
    with pytest.raises(DataError, match="sample 0 holds 4 image tokens for images of 3"):
        source.read(0)


def test_an_image_that_stands_in_the_wrong_piece_is_refused(tmp_path):
    sample = make_sample([70, SMALL, 20], itertools.count(100))
    sample.placements[0] = dataclasses.replace(sample.placements[0], start=5)
    source = open_it(write(tmp_path / "corpus", [sample]))
    with pytest.raises(DataError, match=r"samples \[0\] hold image tokens where no image stands"):
        list(map(source.read, range(source.num_windows)))


@pytest.mark.parametrize("at", [0, 7, -1])
@pytest.mark.parametrize("token", [-5, 10**6])
def test_token_ids_outside_the_vocabulary_are_refused_by_sample(tmp_path, at, token):
    samples = [make_sample([8], itertools.count(100 * n)) for n in (1, 2, 3)]
    samples[1].token_ids[at] = token
    samples[1].loss[at] = 1
    folder = write(tmp_path / "corpus", samples)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "largest_token_id": 500}))
    source = open_it(folder)
    with pytest.raises(DataError, match=f"sample 1 holds token id {token}, outside 0 to"):
        list(map(source.read, range(source.num_windows)))


def test_samples_come_back_as_written_over_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr("aria_train.data.multimodal.store._BATCH_BYTES", 3000)
    monkeypatch.setattr("aria_train.data.multimodal.store._SHARD_BYTES", 20000)
    fresh = itertools.count(100)
    samples = [make_sample([n % 5 + 1, *[SMALL, LARGE, SPLIT][: n % 4]], fresh, f"f:{n}") for n in range(50)]
    reader = Reader(write(tmp_path / "corpus", samples))
    assert len(reader.meta["files"]) > 3
    assert len(reader) == 50
    np.testing.assert_array_equal(reader.lengths(), [len(sample.token_ids) for sample in samples])
    for row in np.random.default_rng(0).permutation(50).tolist() * 2:
        found, expected = reader.sample(row), samples[row]
        reader._open_shard.cache_clear()  # as where there are more files than are kept open
        reader._open_batch.cache_clear()
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        np.testing.assert_array_equal(found.loss, expected.loss)
        assert (found.images, found.placements) == (expected.images, expected.placements)
        assert (found.category, found.origin) == (expected.category, expected.origin)
        assert (reader.length(row), reader.placements(row)) == (len(expected.token_ids), expected.placements)
