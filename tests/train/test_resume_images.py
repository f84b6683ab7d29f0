"""With images in the stream, a killed run still ends as if nothing had happened, and other ranks read the same data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aria_train.config import RunConfig, VisionConfig
from aria_train.data.loader import Loader
from aria_train.data.multimodal import images
from aria_train.data.multimodal.store import Placement, Sample, Writer
from tests.data.test_multimodal import png
from tests.distributed import launch, run_distributed
from tests.tiny import VOCABULARY, tiny_config, unequal_corpora, with_values
from tests.train.test_images_across_ranks import VISION
from tests.train.test_resume import assert_bitwise_equal, assert_killed, result, run, run_until_killed

pytestmark = pytest.mark.distributed

IMAGE = VOCABULARY
"""One more token than the text corpora use."""


def write_pictures(folder: Path) -> str:
    """40 short documents, most with an image or two of either size class; returns the folder."""
    generator = np.random.default_rng(5)
    vision = VisionConfig.model_validate(VISION)
    with Writer(folder) as writer:
        for number in range(40):
            tokens: list[int] = []
            placements, files = [], []
            for _ in range(number % 3):
                file = png(*generator.integers(4, 17, 2).tolist(), seed=number)
                layout = images.layout_of(*images.read_size(file), vision)
                tokens += generator.integers(10, VOCABULARY, 2).tolist()
                placements.append(Placement(len(tokens), layout))
                tokens += [IMAGE] * layout.num_tokens
                files.append(file)
            tokens += generator.integers(10, VOCABULARY, generator.integers(4, 12)).tolist()
            token_ids = np.array(tokens, np.int32)
            loss = (token_ids != IMAGE).astype(np.uint8)
            writer.add(Sample(token_ids, loss, files, placements, "pictures", f"document {number}"))
        sizes = {str(size): queries for size, queries in vision.image_sizes.items()}
        writer.close(divisible=True, image_token_id=IMAGE, image_sizes=sizes)
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpora")
    pictures = {"name": "pictures", "path": write_pictures(folder / "pictures"), "weight": 2.0}
    return [pictures, unequal_corpora(folder)[0]]


def short_run(run_dir: Path, sources: list[dict[str, Any]], ranks: int) -> RunConfig:
    """5 steps with images, saved every second, read by two threads per rank."""
    parallel, checkpoint = {"expert_parallel_size": ranks}, {"interval_steps": 2, "keep_last": 2}
    config = tiny_config(run_dir, sources, parallel=parallel, checkpoint=checkpoint)
    return with_values(
        config,
        model={"num_layers": 1, "vision": VISION, "vocab_size": VOCABULARY + 1, "image_token_id": IMAGE},
        data={"workers": 2},
        train={"global_batch_size": 4},
    )


@pytest.mark.parametrize(("ranks", "step"), [(1, 3), (2, 2), (2, 4)])
def test_killed_in_a_step(ranks: int, step: int, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    undisturbed = short_run(tmp_path / "undisturbed", sources, ranks)
    run_distributed(run, ranks, undisturbed)
    config = short_run(tmp_path / "killed", sources, ranks)
    assert_killed(launch(run_until_killed, ranks, config, 0, "step", step)[0])
    run_distributed(run, ranks, config)
    assert_bitwise_equal(result(config), result(undisturbed))


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_ranks_read_the_same_images_in_the_same_order(
    ranks: int, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = short_run(tmp_path, sources, 1)
    assert [_images_of_step(config, ranks, step) for step in range(4)] == [
        _images_of_step(config, 1, step) for step in range(4)
    ]


def _images_of_step(config: RunConfig, ranks: int, step: int) -> list[tuple[int, float]]:
    """(patches, sum of pixels) of every image of a step, in order of ranks and micro-batches."""
    found = []
    for rank in range(ranks):
        with Loader(config, rank, ranks, start_step=step) as loader:
            for batch in next(loader):
                if batch.images is not None:
                    bounds = batch.images.starts.tolist()
                    parts = [batch.images.patches[a:b] for a, b in itertools.pairwise(bounds)]
                    found += [(len(part), float(part.double().sum())) for part in parts]
    return found
