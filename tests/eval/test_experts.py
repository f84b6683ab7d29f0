"""The specialisation map equals a direct count over the data, and keeps its rules where there is nothing to divide."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.config import ParallelConfig, RunConfig
from aria_train.data.loader import validation_batches
from aria_train.eval.experts import CAP, ExpertUse, count_expert_use
from aria_train.eval.figures import draw_experts
from aria_train.model import AriaModel
from aria_train.parallel.mesh import Meshes, build_meshes
from tests import reference
from tests.distributed import run_distributed
from tests.eval.small import chat_corpus, small_config, small_model, small_tokenizer, text_corpus

IMAGE = 9


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Three held-out sources, two of them with images."""
    home = tmp_path_factory.mktemp("experts")
    tokenizer = small_tokenizer(home)
    sources = [
        {"name": "text", "path": text_corpus(home, tokenizer)},
        {"name": "questions", "path": chat_corpus(home, tokenizer, "questions", 9)},
        {"name": "pictures", "path": chat_corpus(home, tokenizer, "pictures", 7, seed=50)},
    ]
    return small_config(home, data={"validation": sources})


def direct_count(model: AriaModel, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Choices [S, 2, L, E] and tokens [S, 2]: document by document, token by token, in float64 by plain arithmetic."""
    shape = (len(config.data.validation), 2, config.model.num_layers, config.model.num_experts)
    choices, tokens = torch.zeros(shape), torch.zeros(shape[:2])
    for batch in validation_batches(config):
        for source, ids, router_logits in documents(model, batch):
            for at, token in enumerate(ids.tolist()):
                kind = int(token == IMAGE)
                tokens[source, kind] += 1
                for layer, logits in enumerate(router_logits):
                    for expert in sorted(range(shape[3]), key=lambda e: -float(logits[at, e]))[: config.model.top_k]:
                        choices[source, kind, layer, expert] += 1
    return choices, tokens


def documents(model: AriaModel, batch: MicroBatch) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """(source, token ids, router logits of every layer) of each document by itself."""
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    images = batch.images or ImageBatch.empty(model.config.vision.patch_size)
    with torch.no_grad():
        visual = iter(model.projector(model.vision(images), images).double().split(images.num_queries))
    for index, (start, end) in enumerate(itertools.pairwise(batch.starts.tolist())):
        ids = batch.token_ids[start:end].clone()
        count = int((ids == IMAGE).sum())
        rows = []
        while sum(map(len, rows)) < count:
            rows.append(next(visual))
        table = torch.cat([weights["embed.weight"], *rows])
        looked_up = ids.clone()
        looked_up[ids == IMAGE] = torch.arange(len(table) - count, len(table))
        _, logits = reference.forward_document({**weights, "embed.weight": table}, looked_up, model.config)
        yield int(batch.source_ids[index]), ids, logits


def alone() -> Meshes:
    return build_meshes(ParallelConfig(), torch.device("cpu"))


def use_on_rank(config: dict[str, Any], expert_ranks: int) -> ExpertUse:
    from aria_train.model.init import initialise
    from aria_train.parallel.shard import parallelize

    run = RunConfig.model_validate(config)
    model = small_model()
    meshes = build_meshes(ParallelConfig(expert_parallel_size=expert_ranks), torch.device("cpu"))
    if expert_ranks > 1:
        with torch.device("meta"):
            model = AriaModel(run.model)
        parallelize(model, meshes, "fp32").to_empty(device="cpu")
        initialise(model, run.model.init_std, 0)
    return count_expert_use(model, run, meshes)


@pytest.mark.distributed
def test_the_map_equals_a_direct_count_on_one_rank_and_on_two(config: RunConfig):
    choices, tokens = direct_count(small_model(), config)
    assert (tokens.sum(1) > 0).all()
    assert tokens[0, 1] == 0 < tokens[1, 1]
    assert choices.sum().item() == config.model.top_k * config.model.num_layers * tokens.sum().item()
    plain = config.model_dump(mode="json")
    for ranks in (1, 2):
        for use in run_distributed(use_on_rank, ranks, plain, ranks):
            assert use.sources == ["text", "questions", "pictures"]
            assert torch.equal(use.tokens, tokens.double())
            assert torch.equal(use.choices, choices.double())
    ratio = use.ratio(1)
    for layer, expert in itertools.product(range(config.model.num_layers), range(config.model.num_experts)):
        text, visual = choices[1, :, layer, expert].double() / tokens[1].double()
        expected = math.nan if text == visual == 0 else CAP if text == 0 else min(float(visual / text), CAP)
        np.testing.assert_allclose(float(ratio[layer, expert]), expected, rtol=1e-12)


def handmade() -> ExpertUse:
    """One layer of four experts. Source a: 10 text and 5 visual tokens; source b: text only."""
    choices = torch.zeros(2, 2, 1, 4, dtype=torch.float64)
    choices[0, 0, 0] = torch.tensor([6.0, 4.0, 0.0, 0.0])
    choices[0, 1, 0] = torch.tensor([1.0, 0.0, 4.0, 0.0])
    choices[1, 0, 0] = torch.tensor([0.0, 0.0, 20.0, 0.0])
    return ExpertUse(["a", "b"], choices, torch.tensor([[10.0, 5.0], [20.0, 0.0]], dtype=torch.float64))


def test_counts_are_pooled_before_they_are_divided_and_capped():
    use = handmade()
    np.testing.assert_allclose(use.ratio(0)[0], [(1 / 5) / (6 / 10), 0, CAP, math.nan])
    np.testing.assert_allclose(use.ratio()[0], [(1 / 5) / (6 / 30), 0, (4 / 5) / (20 / 30), math.nan])
    assert use.ratio(1).isnan().all(), "a source without images has no visual share"
    many = dataclasses.replace(use, choices=use.choices * torch.tensor([1.0, 500.0]).view(1, 2, 1, 1))
    assert many.ratio(0).nan_to_num().max() == CAP


def test_json_names_the_sources_with_images_and_all_together():
    result = json.loads(json.dumps(handmade().as_json(), allow_nan=False))
    assert list(result["domains"]) == ["a", "all sources"]
    assert result["domains"]["a"]["ratio"][0][2:] == [CAP, None]
    assert result["domains"]["a"]["visual_experts"] == [1]
    assert (result["domains"]["all sources"]["text_tokens"], result["domains"]["a"]["visual_tokens"]) == (30, 5)


def test_the_figure_shows_what_was_never_chosen_in_grey(tmp_path: Path):
    draw_experts(tmp_path / "report" / "experts.png", handmade(), "title")
    pixels = np.asarray(Image.open(tmp_path / "report" / "experts.png").convert("RGB")).reshape(-1, 3)
    grey = (pixels == [0xBD, 0xBD, 0xBD]).all(1).mean()
    assert grey > 0.02
