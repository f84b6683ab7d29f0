"""Evaluations inside training: figures beside the held-out loss, reports in the run directory, alike on any ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aria_train.config import RunConfig, SourceConfig
from aria_train.data import loader
from aria_train.data.text.corpus import open_source
from aria_train.data.window import Source
from aria_train.errors import ConfigError, DataError, UserError
from aria_train.eval.probes import Probes, write_report
from tests.distributed import run_distributed
from tests.eval.small import MODEL, VISION, chat_corpus, small_config, small_model, small_tokenizer, text_corpus
from tests.eval.test_needle import alone


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data section of a run: text and questions about images."""
    home = tmp_path_factory.mktemp("probes")
    tokenizer = small_tokenizer(home)
    sources = [
        {"name": "text", "path": text_corpus(home, tokenizer)},
        {"name": "pictures", "path": chat_corpus(home, tokenizer, "pictures", 9, seed=50)},
    ]
    chat_corpus(home, tokenizer, "questions", 6)
    return {"home": home, "tokenizer": tokenizer, "train": sources, "validation": sources, "workers": 1}


def run_config(corpora: dict[str, Any], run_dir: Path, **sections: Any) -> RunConfig:
    """Two steps with every evaluation before, between and after them."""
    data = {key: value for key, value in corpora.items() if key != "home"}
    grid = {"lengths": [140, 200], "depths": 3}
    questions = str(corpora["home"] / "questions")
    evaluation = {
        "interval_steps": 1,
        "needle": grid,
        "visual_needle": {**grid, "questions": questions},
        "answers": questions,
        "experts": True,
    }
    train = {
        "context_length": 64, "max_steps": 2, "global_batch_size": 4, "precision": "fp32", "device": "cpu",
        "run_dir": str(run_dir), "eval_windows": 4,
    }  # fmt: skip
    values: dict[str, Any] = {"data": data, "train": train, "evaluation": evaluation}
    values["checkpoint"] = {"asynchronous": False}
    return small_config(run_dir, **{**values, **sections})


def evaluations_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains; the lines of evaluations.jsonl."""
    from aria_train.train.trainer import Trainer

    run = RunConfig.model_validate(config)
    Trainer(run).run()
    text = (Path(run.train.run_dir) / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_figures_of_every_step_on_one_rank_and_with_experts_spread_over_two(corpora: dict[str, Any], tmp_path: Path):
    config = run_config(corpora, tmp_path / "one")
    (lines,) = run_distributed(evaluations_of, 1, config.model_dump(mode="json"))
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert {"needle_text_accuracy/140", "needle_text_cells_found", "needle_visual_accuracy"} <= line.keys()
        assert {"answers_accuracy", "visual_experts/pictures", "loss/text"} <= line.keys()
    made = {path.name for path in (tmp_path / "one" / "report").iterdir()}
    for name in ("needle_text", "needle_visual", "experts", "answers"):
        assert {f"{name}_step_{step:08d}.{kind}" for step in (0, 1, 2) for kind in ("json", "png")} <= made

    spread = run_config(corpora, tmp_path / "two", parallel={"expert_parallel_size": 2})
    others = run_distributed(evaluations_of, 2, spread.model_dump(mode="json"))[0]
    for line, other in zip(lines, others, strict=True):
        assert other.pop("stage") == line.pop("stage")
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"needle": {"lengths": [600]}}, "600 tokens"),
        ({"needle": {"haystack": "absent"}}, "absent"),
        ({"visual_needle": {"questions": "absent"}}, "absent"),
        ({"answers": "absent"}, "absent"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(
    corpora: dict[str, Any], tmp_path: Path, evaluation: dict[str, Any], message: str
):
    config = run_config(corpora, tmp_path, evaluation=evaluation)
    with pytest.raises(UserError, match=message):
        Probes(config, alone())


def test_experts_and_needles_need_held_out_data(corpora: dict[str, Any], tmp_path: Path):
    bare = {"train": corpora["train"], "tokenizer": corpora["tokenizer"]}
    for evaluation in ({"experts": True}, {"needle": {}}):
        with pytest.raises(ConfigError, match=r"data\.validation"):
            Probes(small_config(tmp_path, data=bare, evaluation=evaluation), alone())
    with pytest.raises(ConfigError, match=r"data\.tokenizer names no"):
        Probes(small_config(tmp_path, evaluation={"answers": "x"}), alone())


def test_what_a_model_that_reads_text_only_cannot_be_asked_is_refused_before_training(
    corpora: dict[str, Any], tmp_path: Path
):
    data = {"train": corpora["train"][:1], "validation": corpora["train"][:1], "tokenizer": corpora["tokenizer"]}
    questions = str(corpora["home"] / "questions")
    for evaluation, message in (
        ({"experts": True}, "model.vision is null"),
        ({"answers": questions}, "no vision encoder"),
        ({"visual_needle": {"questions": questions}}, "no vision encoder"),
    ):
        config = small_config(tmp_path, model={**MODEL, "vision": None}, data=data, evaluation=evaluation)
        with pytest.raises(UserError, match=message):
            Probes(config, alone())


def test_questions_prepared_for_another_model_are_refused_before_training(corpora: dict[str, Any], tmp_path: Path):
    model = {**MODEL, "vision": {**VISION, "image_sizes": {16: 4, 32: 7}}}
    config = run_config(corpora, tmp_path, model=model, evaluation={"answers": str(corpora["home"] / "questions")})
    with pytest.raises(DataError, match="was prepared for image sizes"):
        Probes(config, alone())


def test_a_file_where_reports_would_go_is_refused_before_training(corpora: dict[str, Any], tmp_path: Path):
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ConfigError, match="report is in the way"):
        Probes(run_config(corpora, tmp_path), alone())


def test_a_report_that_cannot_be_written_ends_nothing(
    corpora: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = run_config(corpora, tmp_path, evaluation={"needle": {"lengths": [140], "depths": 1}})
    probes = Probes(config, alone())
    (tmp_path / "report").write_text("mine")
    assert "needle_text_accuracy" in probes.run(small_model(), 1)
    assert "needle_text_step_00000001.json is not written" in capsys.readouterr().err

    def draw(path: Path) -> None:
        raise ValueError("too large")

    assert write_report(tmp_path / "more", "a", {"loss": [1.0, math.inf]}, draw) == [str(tmp_path / "more" / "a.json")]
    assert json.loads((tmp_path / "more" / "a.json").read_text()) == {"loss": [1.0, None]}
    assert "a.png is not drawn: ValueError: too large" in capsys.readouterr().err


def test_held_out_corpora_are_opened_once_for_all_evaluations(
    corpora: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from aria_train.parallel.job import orderly_end
    from aria_train.train.trainer import Trainer

    opened: list[str] = []

    def open_noted(source: SourceConfig, config: RunConfig) -> Source:
        opened.append(source.name)
        return open_source(source, config)

    monkeypatch.setattr(loader, "open_source", open_noted)
    with orderly_end():
        Trainer(run_config(corpora, tmp_path, evaluation={"interval_steps": 1})).run()
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 3
    assert opened == ["text", "pictures"] * 2, "for training, then for evaluating"


def test_a_visual_needle_without_questions_is_refused_with_the_configuration(tmp_path: Path):
    with pytest.raises(ValueError, match="evaluation.visual_needle needs questions"):
        small_config(tmp_path, evaluation={"visual_needle": {}})
