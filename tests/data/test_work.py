"""Equal work for the ranks of a step: the same windows, dealt out evenly, whatever the layout."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_train.config import ModelConfig, RunConfig
from aria_train.data.loader import Blend, Loader
from aria_train.data.work import deal, forward_flops
from tests.stages.recipe import VISION, captions, conversations, write_text
from tests.tiny import tiny_config

WORLDS = [(2, 1), (2, 3), (4, 1), (3, 2)]
"""(ranks, windows per micro-batch)"""


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 6), micro=st.integers(1, 3), rounds=st.integers(1, 5))
def test_every_window_is_dealt_once(data: st.DataObject, ranks: int, micro: int, rounds: int) -> None:
    count = ranks * micro * rounds
    work = data.draw(st.lists(st.floats(0, 1e12), min_size=count, max_size=count))
    dealt = deal(work, ranks, micro)
    assert dealt.shape == (rounds, ranks, micro)
    assert sorted(dealt.flatten().tolist()) == list(range(count))
    np.testing.assert_array_equal(deal(work, ranks, micro), dealt)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 6), rounds=st.integers(1, 6))
def test_ranks_differ_by_less_than_one_window(data: st.DataObject, ranks: int, rounds: int) -> None:
    work = np.array(data.draw(st.lists(st.floats(0, 1), min_size=ranks * rounds, max_size=ranks * rounds)))
    dealt = deal(work.tolist(), ranks, 1)
    sums = work[dealt].sum((0, 2))
    assert sums.max() - sums.min() <= work.max() - work.min() + 1e-9
    # What runs side by side is next to each other in order of work.
    rounds_of = np.sort(work)[::-1].reshape(rounds, ranks)
    np.testing.assert_array_equal(np.sort(work[dealt[:, :, 0]])[:, ::-1], rounds_of)


def test_flops_count_what_a_plain_count_counts() -> None:
    model = ModelConfig(vocab_size=50, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4,
                        num_experts=4, top_k=2, expert_size=12, num_shared_experts=1, balance_group_size=2,
                        vision=VISION)  # fmt: skip
    products = 0
    for length in (5, 9):
        weights = 8 * 8 + 8 * 4 * 2 + 8 * 8 + 8 * 4 + 3 * (8 * 24 + 12 * 8)
        products += length * (3 * weights + 8 * 50)
        products += 3 * length * length // 1 * 8  # both halves of attention, half of the pairs
    size, mlp, layers = (VISION[key] for key in ("hidden_size", "mlp_size", "num_layers"))
    for patches in (4, 16):
        products += layers * (patches * (4 * size * size + 2 * size * mlp) + 2 * patches * patches * size)
    assert forward_flops([5, 9], [4, 16], model) == pytest.approx(2 * products)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Windows of long and of short documents, of text and of images."""
    folder = tmp_path_factory.mktemp("work")
    sources: list[dict[str, Any]] = [
        {"name": "long", "path": write_text(folder / "long", 60, 20, 300)},
        {"name": "short", "path": write_text(folder / "short", 200, 5, 20)},
        {"name": "joined", "path": captions(folder / "captions"), "concatenate": "window"},
        {"name": "chat", "path": conversations(folder / "chat")},
    ]
    train = {"context_length": 128, "global_batch_size": 12}
    return tiny_config(folder / "run", sources, model={"vision": VISION}, train=train)


def test_work_is_known_without_reading(config: RunConfig) -> None:
    blend = Blend(config)
    for index in range(60):
        which, position = blend.locate(index)
        window = blend.sources[which].read(position)
        patches = [len(image.patches) for image in window.images]
        wanted = forward_flops(window.document_lengths.tolist(), patches, config.model)
        assert blend.work(index) == pytest.approx(wanted, rel=1e-9)


def steps(config: RunConfig, ranks: int, micro: int, start: int = 0, count: int = 4) -> list[list[list[Any]]]:
    """[step][rank] -> token ids of that rank's documents, micro-batch by micro-batch."""
    values = {"data": {"balance_work": True}, "train": {"micro_batch_size": micro}}
    changed = {section: {**config.model_dump()[section], **fields} for section, fields in values.items()}
    config = RunConfig.model_validate({**config.model_dump(), **changed})
    found: list[list[list[Any]]] = [[] for _ in range(count)]
    for rank in range(ranks):
        with Loader(config, rank, ranks, start) as loader:
            for step, batches in enumerate(islice(loader, count)):
                found[step].append([batch.token_ids.tolist() for batch in batches])
    return found


@pytest.mark.parametrize(("ranks", "micro"), WORLDS)
def test_the_global_batch_stays_the_same_set(config: RunConfig, ranks: int, micro: int) -> None:
    def windows(step: list[list[Any]]) -> list[int]:
        return sorted(token for rank in step for batch in rank for token in batch)

    assert [windows(step) for step in steps(config, ranks, micro)] == [windows(step) for step in steps(config, 1, 12)]


def test_it_goes_on_from_any_step(config: RunConfig) -> None:
    assert steps(config, 2, 1, start=2, count=2) == steps(config, 2, 1)[2:]


def test_ranks_carry_near_equal_work(config: RunConfig) -> None:
    """Against slices as they come: the busiest rank of each of 50 steps, and of each of their rounds."""
    blend, ranks = Blend(config), 4
    excess: dict[str, list[float]] = {"rank": [], "round": [], "plain rank": [], "plain round": []}
    for step in range(50):
        work = np.array([blend.work(step * 12 + number) for number in range(12)])
        for prefix, dealt in (("", deal(work.tolist(), ranks, 1)), ("plain ", np.arange(12).reshape(ranks, 3, 1).T)):
            of_round = work[dealt.reshape(3, ranks)]
            excess[f"{prefix}rank"].append(of_round.sum(0).max() / of_round.sum(0).mean())
            excess[f"{prefix}round"].append(of_round.max(1).sum() / of_round.mean(1).sum())
    mean = {name: float(np.mean(values)) for name, values in excess.items()}
    assert mean["rank"] - 1 < 0.5 * (mean["plain rank"] - 1), mean
    assert mean["round"] - 1 < 0.5 * (mean["plain round"] - 1), mean
