import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_train.data.packing import PackingPlan, cached_plan, pack, plan_documents

LENGTHS = st.lists(st.integers(0, 60), max_size=80)


def targets_of(plan: PackingPlan, lengths: list[int], context: int) -> list[list[tuple[int, int]]]:
    """(document, index of the target token) of every position, by window."""
    windows = []
    for first, last in zip(plan.starts[:-1], plan.starts[1:]):
        positions = []
        for document, piece in zip(plan.documents[first:last], plan.pieces[first:last]):
            begin = int(piece) * context
            end = min(begin + context, lengths[document] - 1)
            positions += [(int(document), token) for token in range(begin + 1, end + 1)]
        windows.append(positions)
    return windows


@given(LENGTHS, st.integers(1, 25), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_a_target_once_and_nothing_is_split_needlessly(
    lengths: list[int], context: int, seed: int
) -> None:
    plan = plan_documents(np.array(lengths, np.int64), context, seed)
    windows = targets_of(plan, lengths, context)
    assert all(0 < len(window) <= context for window in windows)
    seen = sorted(target for window in windows for target in window)
    assert seen == [(document, token) for document, length in enumerate(lengths) for token in range(1, length)]
    for document, length in enumerate(lengths):
        if 1 < length <= context + 1:
            assert sum(any(d == document for d, _ in window) for window in windows) == 1
    assert plan.stats.without_targets == sum(length < 2 for length in lengths)
    assert plan.stats.cut == sum(length > context + 1 for length in lengths)
    assert plan.stats.targets == len(seen)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 50))
@settings(max_examples=200, deadline=None)
def test_it_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """Bins of the one-at-a-time rule: longest first, each into the fullest bin that takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        tightest = min(fitting, key=lambda index: rooms[index])
        rooms[tightest] -= length
    starts, order = pack(np.array(lengths), capacity, seed=0)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in order[a:b]) for a, b in itertools.pairwise(starts)]
    assert sorted(capacity - room for room in rooms) == sorted(used)


def test_the_seed_decides_who_shares_a_window() -> None:
    lengths = np.random.default_rng(0).integers(2, 100, 500)
    one, same, other = (plan_documents(lengths, 128, seed) for seed in (1, 1, 2))
    assert one.documents.tolist() == same.documents.tolist() != other.documents.tolist()
    assert one.stats == other.stats


def test_neighbours_in_the_corpus_do_not_stay_neighbours() -> None:
    plan = plan_documents(np.full(1000, 33), 64, seed=0)
    assert np.diff(plan.starts).tolist() == [2] * 500
    pairs = plan.documents.reshape(-1, 2)
    assert (np.abs(pairs[:, 0] - pairs[:, 1]) == 1).mean() < 0.02


def test_the_order_is_the_same_on_every_machine() -> None:
    """Data order is part of a run's identity: a change here must raise PLAN_VERSION."""
    plan = plan_documents(np.array([9, 3, 5, 12, 2, 7, 4, 1, 6, 8]), 8, seed=5)
    assert plan.documents.tolist() == [3, 0, 9, 4, 5, 1, 8, 3, 2, 6]
    assert plan.pieces.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert plan.starts.tolist() == [0, 1, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("context", [2048, 16384])
def test_windows_are_nearly_full(context: int) -> None:
    lengths = np.random.default_rng(0).lognormal(6.3, 1.2, 20_000).astype(np.int64)
    assert plan_documents(lengths, context, 0).stats.efficiency > 0.998


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def small_plan() -> PackingPlan:
    return plan_documents(np.arange(100), 32, 0)


def same(a: PackingPlan, b: PackingPlan) -> bool:
    arrays = all((getattr(a, name) == getattr(b, name)).all() for name in ("starts", "documents", "pieces"))
    return arrays and a.stats == b.stats


def refuse() -> PackingPlan:
    raise AssertionError("built again")


def test_a_plan_is_built_once_and_then_mapped(tmp_path: Path) -> None:
    built = cached_plan([tmp_path / "plans"], "key", small_plan)
    again = cached_plan([tmp_path / "plans"], "key", refuse)
    assert same(built, small_plan())
    assert same(again, built)
    assert [file.name for file in (tmp_path / "plans").iterdir()] == ["key"]
    with pytest.raises(ValueError, match="read-only"):
        again.documents[0] = 1


def test_the_fallback_serves_where_the_first_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folders = [tmp_path / "file" / "plans", tmp_path / "fallback"]
    cached_plan(folders, "key", small_plan)
    assert same(cached_plan(folders, "key", refuse), small_plan())
    assert same(cached_plan(folders[:1], "key", small_plan), small_plan())


@pytest.mark.parametrize("name", ["stats.json", "starts.npy", "documents.npy", "pieces.npy"])
def test_a_damaged_plan_is_built_again(tmp_path: Path, name: str) -> None:
    cached_plan([tmp_path], "key", small_plan)
    file = tmp_path / "key" / name
    for damaged in (b"", file.read_bytes()[:-5], bytes(file.stat().st_size)):
        file.write_bytes(damaged)
        assert same(cached_plan([tmp_path], "key", small_plan), small_plan())
        assert same(cached_plan([tmp_path], "key", refuse), small_plan())


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        cached_plan([tmp_path], "key", refuse)
    assert list(tmp_path.iterdir()) == []


def _build_and_count(folder: Path) -> None:
    def build() -> PackingPlan:
        with open(folder / "builds", "a") as file:
            file.write("x")
        return small_plan()

    assert same(cached_plan([folder / "plans"], "key", build), small_plan())


def test_processes_that_want_the_same_plan_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_and_count, args=(tmp_path,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "builds").read_text() == "x"
    assert [file.name for file in (tmp_path / "plans").iterdir()] == ["key"]
