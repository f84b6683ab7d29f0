import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aria_train.batch import MicroBatch
from aria_train.config import RunConfig
from aria_train.data.loader import Blend, Loader, open_validation, pack_windows, validation_batches
from aria_train.data.window import Window
from aria_train.errors import ConfigError, DataError
from tests.data.corpora import END, random_documents, run_config, write_corpus


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    return {
        "web": write_corpus(tmp_path / "web", random_documents(60, 80, seed=1)),
        "code": write_corpus(tmp_path / "code", random_documents(40, 120, seed=2)),
    }


@pytest.fixture
def config(tmp_path: Path, corpora: dict[str, Path]) -> RunConfig:
    return run_config(tmp_path / "run", corpora, weights=[0.7, 0.3])


def with_train(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def documents(batches: list[MicroBatch]) -> list[tuple[int, tuple[int, ...]]]:
    """(source, tokens) of all documents, in order."""
    found = []
    for batch in batches:
        pieces = batch.token_ids.tensor_split(batch.starts[1:-1].long())
        found += [(int(source), tuple(piece.tolist())) for source, piece in zip(batch.source_ids, pieces, strict=True)]
    return found


def steps(config: RunConfig, count: int, world_size: int = 1, start_step: int = 0) -> list[list[Any]]:
    """Documents of each global batch: those of rank 0, then rank 1, ..."""
    result: list[list[Any]] = [[] for _ in range(count)]
    for rank in range(world_size):
        with Loader(config, rank, world_size, start_step) as loader:
            for step, batches in enumerate(islice(loader, count)):
                result[step] += documents(batches)
    return result


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_global_batch_is_the_same_at_any_layout(config: RunConfig, world_size: int, micro_batch_size: int) -> None:
    expected = steps(with_train(config, micro_batch_size=8), 12)
    assert steps(with_train(config, micro_batch_size=micro_batch_size), 12, world_size) == expected


@pytest.mark.parametrize("start_step", [1, 5, 11])
def test_it_goes_on_from_any_step(config: RunConfig, start_step: int) -> None:
    assert steps(config, 3, 2, start_step) == steps(config, 14)[start_step : start_step + 3]


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("ahead", [1, 20])
def test_threads_do_not_change_the_order(config: RunConfig, workers: int, ahead: int) -> None:
    data = config.data.model_copy(update={"workers": workers, "prefetch_batches": ahead})
    assert steps(config.model_copy(update={"data": data}), 10) == steps(config, 10)


def test_micro_batches_are_shaped_as_promised(config: RunConfig) -> None:
    with Loader(with_train(config, micro_batch_size=4)) as loader:
        batches = next(loader)
    assert len(batches) == 2
    for batch in batches:
        assert batch.token_ids.dtype == batch.labels.dtype == batch.source_ids.dtype == torch.int64
        assert batch.starts.dtype == torch.int32
        assert batch.starts[0] == 0
        assert batch.starts[-1] == len(batch.token_ids) == len(batch.labels) <= 4 * 64
        assert len(batch.source_ids) == len(batch.starts) - 1
        assert batch.max_document == batch.starts.diff().max()
        assert batch.images is None
        for begin, end in zip(batch.starts[:-1], batch.starts[1:]):
            assert torch.equal(batch.token_ids[begin + 1 : end], batch.labels[begin : end - 1])


def test_every_epoch_of_a_source_is_complete_and_in_another_order(tmp_path: Path, corpora: dict[str, Path]) -> None:
    blend = Blend(run_config(tmp_path / "run", {"web": corpora["web"]}))
    size = blend.sources[0].num_windows
    epochs = [[blend.locate(epoch * size + place)[1] for place in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sources_follow_their_weights_through_many_epochs(config: RunConfig) -> None:
    blend = Blend(config)
    drawn = [blend.locate(index)[0] for index in range(3000)]
    assert abs(drawn.count(0) - 2100) <= 3


def test_the_seed_changes_the_order(config: RunConfig) -> None:
    assert steps(with_train(config, seed=1), 5) != steps(config, 5)


def test_what_goes_wrong_in_a_thread_is_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    documents = random_documents(30, 60)
    documents[3] = [5, 1023, 5000, END]
    with Loader(run_config(tmp_path / "run", {"web": write_corpus(tmp_path / "web", documents)})) as loader:
        with pytest.raises(DataError, match="document 3 holds token id 5000"):
            list(islice(loader, 20))
        before = threading.active_count()
    assert threading.active_count() <= before


def test_closing_ends_the_threads_also_in_the_middle(config: RunConfig) -> None:
    before = threading.active_count()
    loader = Loader(config)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []
    loader.close()


def test_batches_are_read_ahead_but_not_without_bound(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(Blend, "micro_batch", lambda self, windows: read.append(windows[0]))
    monkeypatch.setattr("aria_train.data.loader.pin", lambda batch: batch)
    data = config.data.model_copy(update={"prefetch_batches": 3})
    with Loader(config.model_copy(update={"data": data})) as loader:
        next(loader)
        for _ in range(100):
            if len(read) == 8 + 3:
                break
            time.sleep(0.01)
        assert sorted(read) == list(range(8 + 3))


def test_one_source_read_by_many_threads(config: RunConfig) -> None:
    blend = Blend(config)
    alone = [documents([blend.micro_batch((first, first + 1))]) for first in range(100)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda first: documents([blend.micro_batch((first, first + 1))]), range(100)))
    assert together == alone


def test_a_blend_without_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.train: no source given"):
        Loader(run_config(tmp_path, {}))


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def validation(config: RunConfig, world_size: int = 1) -> list[Any]:
    ranks: Iterator[MicroBatch]
    found = []
    for rank in range(world_size):
        ranks = validation_batches(config, rank, world_size)
        found += documents(list(ranks))
    return sorted(found)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 1), (3, 2), (4, 8)])
def test_validation_windows_are_the_same_at_any_layout(
    config: RunConfig, world_size: int, micro_batch_size: int
) -> None:
    config = with_train(config, eval_windows=10)
    assert validation(with_train(config, micro_batch_size=micro_batch_size), world_size) == validation(config)


def test_validation_does_not_depend_on_the_seed_and_covers_each_source(config: RunConfig) -> None:
    config = with_train(config, eval_windows=10)
    assert validation(with_train(config, seed=5)) == validation(config)
    batches = list(validation_batches(config))
    assert [int(batch.source_ids[0]) for batch in batches] == [0] * 10 + [1] * 10
    assert all(len(batch.source_ids.unique()) == 1 for batch in batches)


def test_validation_reads_sources_that_are_open_already(config: RunConfig) -> None:
    config = with_train(config, eval_windows=10)
    sources = open_validation(config)
    assert documents(list(validation_batches(config, sources=sources))) == documents(list(validation_batches(config)))
    assert not list(validation_batches(config, sources=[]))


def test_validation_takes_all_windows_of_a_small_source(config: RunConfig) -> None:
    blend = Blend(with_train(config, seed=0))
    batches = list(validation_batches(with_train(config, eval_windows=10**6)))
    assert len(batches) == sum(source.num_windows for source in blend.sources)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def image(patches: int, queries: int) -> Any:
    return SimpleNamespace(
        patches=np.full((patches, 12), 51 * patches, np.uint8),
        position_ids=np.arange(patches, dtype=np.int64),
        num_queries=queries,
    )


def window(tokens: int, images: list[Any]) -> Window:
    ids = np.arange(tokens, dtype=np.int32)
    return Window(ids, ids, np.array([tokens], np.int32), images)


def test_images_of_all_windows_become_one_sequence_of_patches() -> None:
    batch = pack_windows([window(3, [image(2, 4), image(5, 8)]), window(2, []), window(4, [image(1, 4)])], [0, 1, 0])
    assert batch.images is not None
    assert batch.images.starts.tolist() == [0, 2, 7, 8]
    assert batch.images.starts.dtype == torch.int32
    assert batch.images.patches.dtype == torch.float32
    assert batch.images.patches[:, 0].tolist() == pytest.approx([-0.2, -0.2, 1, 1, 1, 1, 1, -0.6])
    assert batch.images.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 0]
    assert batch.images.num_queries == [4, 8, 4]
    assert batch.images.query_starts is not None
    assert batch.images.query_starts.tolist() == [0, 4, 12, 16]
    assert batch.visual_positions is None
    assert batch.source_ids.tolist() == [0, 1, 0]


def test_the_batch_says_where_images_stand_in_the_text() -> None:
    batch = pack_windows([window(3, [image(2, 1)]), window(2, []), window(4, [image(1, 1)])], [0, 0, 0], 2)
    assert batch.visual_positions is not None
    assert batch.visual_positions.tolist() == [2, 7]
    assert batch.visual_positions.dtype == torch.int64
