"""Ranks with unequal shares of an evaluation, among them ranks without any, find what one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aria_train.config import ParallelConfig, RunConfig
from aria_train.data.text.needles import Haystack
from aria_train.eval.answers import answer_questions, read_questions
from aria_train.eval.experts import count_expert_use
from aria_train.eval.loss import evaluate_loss
from aria_train.eval.needle import Grid, TextNeedles, run_needles
from aria_train.eval.prompts import PromptWriter
from aria_train.model import AriaModel
from aria_train.model.init import initialise
from aria_train.parallel.mesh import build_meshes
from aria_train.parallel.shard import parallelize
from tests.distributed import run_distributed
from tests.eval.small import MODEL, chat_corpus, small_config, small_tokenizer, text_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run with text and questions about images to evaluate on, and experts that three ranks can share."""
    home = tmp_path_factory.mktemp("unequal")
    tokenizer = small_tokenizer(home)
    sources = [
        {"name": "text", "path": text_corpus(home, tokenizer)},
        {"name": "questions", "path": chat_corpus(home, tokenizer, "questions", 4)},
    ]
    data = {"tokenizer": tokenizer, "validation": sources}
    return small_config(home, model={**MODEL, "num_experts": 6}, data=data).model_dump(mode="json")


def figures(values: dict[str, Any], expert_ranks: int) -> dict[str, Any]:
    """Losses, experts, answers and needles. Of three ranks two have no window of their own in an evaluation of one
    window per source, two of four in the second round of four questions, one in that of five needles."""
    config = RunConfig.model_validate(values)
    meshes = build_meshes(ParallelConfig(expert_parallel_size=expert_ranks), torch.device("cpu"))
    with torch.device("meta"):
        model = AriaModel(config.model)
    parallelize(model, meshes, "fp32").to_empty(device="cpu")
    initialise(model, config.model.init_std, 0)
    found: dict[str, Any] = {}
    for windows in (1, 4):
        config.train.eval_windows, config.train.micro_batch_size = windows, 1
        found |= {f"{name} of {windows}": loss for name, loss in evaluate_loss(model, config, meshes).items()}
        use = count_expert_use(model, config, meshes)
        found[f"experts of {windows}"] = (use.choices.tolist(), use.tokens.tolist())
    assert config.data.tokenizer is not None
    writer = PromptWriter(config.data.tokenizer, config.model)
    text, questions = (str(source.path) for source in config.data.validation)
    for limit in (1, 4):
        prompts = read_questions(questions, writer, limit)
        answers = answer_questions(model, meshes, prompts, writer, 1).answers
        found[f"answers of {limit}"] = [(answer.said, answer.exact) for answer in answers]
    needles = TextNeedles(Haystack(text, config.data.tokenizer))
    for depths in ([0.5], [0.0, 0.2, 0.5, 0.8, 1.0]):
        result = run_needles(model, meshes, needles, Grid([140], depths, 1), 1, stop={2})
        found[f"needles of {len(depths)}"] = (result.greedy, result.loss)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_ranks_without_a_share_stand_in_for_the_others(config: dict[str, Any]):
    (expected,) = run_distributed(figures, 1, config, 1)
    spread, replicated = (run_distributed(figures, 3, config, expert_ranks) for expert_ranks in (3, 1))
    for found in [*spread, *replicated]:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("loss"):
                assert found[name] == pytest.approx(value, rel=1e-5), name
            elif name.startswith("needles"):
                assert found[name][0] == value[0]
                assert found[name][1][0] == pytest.approx(value[1][0], rel=1e-5)
            else:
                assert found[name] == value, name
