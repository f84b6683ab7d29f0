"""Ranks with and without images take the same steps as one process that has them all, and never wait for one another
in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train.batch import IGNORE_LABEL, ImageBatch, MicroBatch
from aria_train.config import RunConfig
from tests.distributed import run_distributed
from tests.tiny import VOCABULARY, tiny_config, unequal_corpora, with_values

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
STEPS, WINDOWS, IMAGE = 3, 8, 9
VISION = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 32,
    "patch_size": 4,
    "position_grid": 4,
    "image_sizes": {8: 2, 16: 5},
    "min_image_size": 4,
}
# Which of a step's eight windows hold images. With four ranks, windows 0 and 1 are rank 0's, and so on.
MIXES: dict[str, tuple[int, ...]] = {
    "on rank 0 only": (0, 1),
    "on alternating ranks": (0, 1, 4, 5),
    "in one micro-batch of each rank": (1, 2, 5, 6),
    "nowhere": (),
    "everywhere": tuple(range(WINDOWS)),
}
LAYOUTS = {"1 rank": (1, 1), "EP 2": (2, 2), "ZeRO 2": (2, 1), "EP 2 x ZeRO 2": (4, 2)}


def window(step: int, index: int, with_images: bool) -> MicroBatch:
    """A window of random tokens; with images, one of each size class stands in its text."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(10, VOCABULARY, (20 + index,), generator=generator)
    labels = tokens.roll(-1)
    images = None
    if with_images:
        tokens[2:4] = tokens[6:11] = IMAGE
        labels[(tokens == IMAGE).roll(-1)] = IGNORE_LABEL
        patches = torch.randn(4 + 12, 3 * 16, generator=generator)
        positions = torch.randint(0, 16, (16,), generator=generator)
        images = ImageBatch(patches, positions, torch.tensor([0, 4, 16], dtype=torch.int32), [2, 5])
    labels[-1] = IGNORE_LABEL
    starts = torch.tensor([0, 14, len(tokens)], dtype=torch.int32)
    return MicroBatch(tokens, labels, starts, 14, torch.zeros(2, dtype=torch.int64), images)


def take_steps(config: RunConfig, mixes: dict[str, tuple[int, ...]]) -> dict[str, tuple[list[Any], dict[str, Tensor]]]:
    """Per mix, the metrics of every step and the weights after the last."""
    from aria_train.train.trainer import Trainer

    results = {}
    for name, with_images in mixes.items():
        trainer = Trainer(with_values(config, train={"run_dir": f"{config.train.run_dir} {name}"}))
        each = WINDOWS // trainer.meshes.world_size
        mine = range(trainer.meshes.rank * each, (trainer.meshes.rank + 1) * each)
        steps = [trainer._step([window(s, i, i in with_images) for i in mine]) for s in range(STEPS)]
        trainer.loader.close()
        parameters = dict(trainer.state.model.named_parameters())
        weights = {k: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for k, p in parameters.items()}
        results[name] = (steps, weights)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("images")
    sources = unequal_corpora(folder / "corpora")
    train = {"global_batch_size": WINDOWS, "micro_batch_size": 1, "max_steps": STEPS}
    base = tiny_config(folder / "run", sources, train=train)
    base = with_values(base, model={"vision": VISION})
    results = {}
    for name, (ranks, expert) in LAYOUTS.items():
        config = with_values(base, parallel={"expert_parallel_size": expert}, train={"run_dir": str(folder / name)})
        results[name] = run_distributed(take_steps, ranks, config, MIXES, timeout=180)[0]
    return results


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1 rank"])
def test_every_layout_takes_the_steps_of_one_process(layout: str, mix: str, trained: dict[str, Any]) -> None:
    steps, weights = trained[layout][mix]
    expected_steps, expected_weights = trained["1 rank"][mix]
    for line, wanted in zip(steps, expected_steps, strict=True):
        for metric in ("loss", "balance_loss", "z_loss", "grad_norm"):
            assert line[metric] == pytest.approx(wanted[metric], rel=TOLERANCE), metric
    for name, wanted in expected_weights.items():
        difference = (weights[name] - wanted).abs().max()
        # Biases start at 0 and have barely moved. Softmax does not see those of keys: rounding alone moves them, and
        # Adam makes much of it.
        of_keys = name.endswith(("attention.k.bias", "in_proj_bias"))
        scale = 1.0 if of_keys else max(float(wanted.abs().max()), 0.1)
        assert difference <= TOLERANCE * scale, name


def test_images_move_the_vision_encoder_and_their_absence_leaves_it(trained: dict[str, Any]) -> None:
    name = "vision.layers.0.mlp.fc1.bias"
    assert trained["1 rank"]["everywhere"][1][name].abs().max() > 0
    assert trained["1 rank"]["nowhere"][1][name].abs().max() == 0


@pytest.mark.parametrize("mix", MIXES)
def test_metrics_count_the_images_of_the_global_batch(mix: str, trained: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        assert [line["images"] for line in trained[layout][mix][0]] == [2 * len(MIXES[mix])] * STEPS
