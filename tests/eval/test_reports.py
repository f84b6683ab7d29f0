"""The evaluation commands from outside: what they print and leave behind, alone and on two ranks, and their errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aria_train.cli import main, parse
from aria_train.errors import DataError
from tests.eval.small import (
    MODEL,
    chat_corpus,
    last_json,
    picture,
    save_checkpoint,
    small_config,
    small_model,
    small_tokenizer,
    text_corpus,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of a model of random weights, and corpora beside it."""
    home = tmp_path_factory.mktemp("reports")
    tokenizer = small_tokenizer(home)
    sources = [
        {"name": "text", "path": text_corpus(home, tokenizer)},
        {"name": "questions", "path": chat_corpus(home, tokenizer, "questions", 9)},
        {"name": "pictures", "path": chat_corpus(home, tokenizer, "pictures", 7, seed=50)},
    ]
    config = small_config(home, data={"tokenizer": tokenizer, "validation": sources})
    save_checkpoint(small_model(), config, step=3)
    return home / "run"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """Runs a command; the JSON of its last line."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return last_json(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aria-train: error: ")
    assert "Traceback" not in error
    return error


def test_loss_by_source(run: Path, capsys: pytest.CaptureFixture[str]):
    result = call(capsys, "eval", "loss", run)
    assert result["checkpoint"] == str(run / "checkpoints" / "step_00000003")
    assert result["step"] == 3
    losses = [result[f"loss/{name}"] for name in ("text", "questions", "pictures")]
    assert all(math.log(384) / 2 < loss < 40 for loss in losses)
    assert min(losses) < result["loss"] < max(losses)
    kept = json.loads((run / "report" / "loss_step_00000003.json").read_text())
    assert kept == {key: value for key, value in result.items() if key != "files"}


def test_other_data_and_other_windows(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    text = run.parent / "text"
    options = ("--windows", 3, "--output", tmp_path)
    short = call(capsys, "eval", "loss", run, "--data", f"mine={text}", *options)
    assert short["loss"] == short["loss/mine"]
    assert (tmp_path / "loss_step_00000003.json").is_file()
    long = call(capsys, "eval", "loss", run, "--data", text, "--context-length", 300, *options)
    assert long["loss/text"] != short["loss/mine"]


def test_needles_in_text_and_among_images(run: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--lengths", 140, 200, "--depths", 3, "--trials", 2)
    result = call(capsys, "eval", "needle", run, *options)
    assert (result["lengths"], result["depths"], result["trials"]) == ([140, 200], [0, 0.5, 1], 2)
    assert np.shape(result["teacher_forced"]) == np.shape(result["greedy"]) == (2, 3)
    for file in result["files"]:
        assert Path(file).parent == run / "report"
    assert Image.open(run / "report" / "needle_text_step_00000003.png").size[0] > 300
    result = call(capsys, "eval", "needle", run, "--questions", run.parent / "questions", *options)
    assert result["needle"] == "visual"
    assert (run / "report" / "needle_visual_step_00000003.png").is_file()


def test_experts(run: Path, capsys: pytest.CaptureFixture[str]):
    result = call(capsys, "eval", "experts", run)
    assert list(result["domains"]) == ["questions", "pictures", "all sources"]
    assert np.shape(result["domains"]["pictures"]["ratio"]) == (3, 8)
    assert (run / "report" / "experts_step_00000003.png").is_file()


def test_experts_without_images_are_counted_and_not_drawn(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    result = call(capsys, "eval", "experts", run, "--data", run.parent / "text", "--output", tmp_path)
    assert result["domains"] == {}
    assert result["files"] == [str(tmp_path / "experts_step_00000003.json")]


def test_answers_with_a_contact_sheet(run: Path, capsys: pytest.CaptureFixture[str]):
    result = call(capsys, "eval", "answers", run, run.parent / "questions")
    assert result["questions"] == 9
    assert 0 <= result["accuracy"] <= 1
    assert (run / "report" / "answers_questions_step_00000003.png").is_file()
    lines = run.parent / "questions_raw" / "questions.jsonl"
    again = call(capsys, "eval", "answers", run, lines, "--limit", 4)
    assert again["questions"] == 4


def test_generate_from_images_and_text(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture())

    def say(*arguments: Any) -> str:
        assert main(["generate", str(run), "--max-new-tokens", "8", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    plain = say("--prompt", "the quick fox")
    assert plain == say("--prompt", "the quick fox")
    seen = say("--prompt", "the quick fox", "--image", tmp_path / "a.png")
    assert seen != plain
    assert say("--prompt", "<|img|>the quick fox", "--image", tmp_path / "a.png") == seen
    assert say("--prompt", "the quick fox", "--image", tmp_path / "a.png", "--chat") not in (plain, seen)
    assert say("--prompt", "the quick fox", "--temperature", 1, "--seed", 1) != plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a <|img|>"), "1 image placeholder(s) <|img|>, but 0 image(s)"),
        (("--prompt", "a", "--image", "absent.png"), "absent.png: cannot be read (No such file"),
        (("--prompt", "a", "--temperature", -1), "--temperature -1.0: must be 0"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature nan: must be 0"),
        (("--prompt", "a", "--temperature", "inf"), "--temperature inf: must be 0"),
        (("--prompt", "a", "--seed", 10**26), f"--seed {10**26}: must be 0 or more and below 2^63"),
        (("--prompt", "caf\udce9"), "--prompt is not valid UTF-8"),
        (("--prompt", "a", "--top-p", 0), "--top-p 0.0: must be above 0"),
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens 0: must be 1 or more"),
        (("--prompt", "fox " * 600), "model.max_positions"),
        (("--prompt", "a", "--tokenizer", "absent"), "absent: no such tokenizer folder"),
    ],
)
def test_what_cannot_be_generated_from(run: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str):
    assert message in refused(capsys, "generate", run, *arguments)


def test_a_path_that_is_no_text_is_refused_like_any_other(run: Path):
    args = parse(["generate", str(run), "--prompt", "a", "--tokenizer", "caf\udce9"])
    with pytest.raises(DataError, match="no such tokenizer folder"):
        args.run(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("needle", "--lengths", 600), "model.max_positions, which is 512"),
        (("needle", "--lengths", 40), "more than a haystack of length 40"),
        (("needle", "--depths", 0), "depths: 0 given"),
        (("needle", "--haystack", "absent"), "absent"),
        (("needle", "--questions", "absent"), "absent"),
        (("loss", "--data", "absent"), "absent"),
        (("loss", "--context-length", 9999), "error: train.context_length 9999 exceeds model.max_positions 512.\n"),
        (("loss", "--context-length", 0), "train.context_length: 0 given; must be greater than 0"),
        (("loss", "--windows", 0), "train.eval_windows: 0 given; must be greater than 0"),
        (("answers", "absent", "--limit", 0), "--limit 0: must be 1 or more"),
        (("answers", "absent"), "absent: neither a prepared multimodal folder"),
        (("experts", "--data", "absent"), "absent"),
    ],
)
def test_what_cannot_be_evaluated(run: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str):
    assert message in refused(capsys, "eval", arguments[0], run, *arguments[1:])


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_folder_for_results_that_cannot_be(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str):
    (tmp_path / "taken").write_text("mine")
    assert "Give another folder with --output" in refused(capsys, "eval", "loss", run, "--output", tmp_path / place)


@pytest.fixture(scope="module")
def blind(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a model that reads text only."""
    home = tmp_path_factory.mktemp("blind")
    sources = [{"name": "text", "path": str(run.parent / "text")}]
    data = {"tokenizer": str(run.parent / "tokenizer"), "validation": sources}
    config = small_config(home, model={**MODEL, "vision": None}, data=data)
    save_checkpoint(small_model(vision=None), config)
    return home / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("needle", "--questions", "questions"), "the model has no vision encoder"),
        (("needle", "--questions", "questions", "--haystack", "pictures"), "the model has no vision encoder"),
        (("answers", "questions"), "the model has no vision encoder"),
        (("answers", "questions_raw/questions.jsonl"), "no model.vision section"),
        (("experts",), "model.vision is null"),
    ],
)
def test_a_model_that_reads_text_only_is_asked_about_no_images(
    run: Path, blind: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
):
    paths = [str(run.parent / word) if (run.parent / word).exists() else word for word in arguments[1:]]
    assert message in refused(capsys, "eval", arguments[0], blind, *paths)


def test_a_tokenizer_of_more_tokens_than_the_model(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = small_config(tmp_path, model={**MODEL, "vision": None, "vocab_size": 320})
    save_checkpoint(small_model(vision=None, vocab_size=320), config)
    tokenizer = ("--tokenizer", run.parent / "tokenizer")
    for command in (("generate", "--prompt", "a"), ("eval needle", "--haystack", run.parent / "text")):
        error = refused(capsys, *command[0].split(), tmp_path / "run", *command[1:], *tokenizer)
        assert "tokens, more than model.vocab_size 320" in error


def test_a_model_that_diverged_is_reported_as_it_is(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    model = small_model()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    data = {
        "tokenizer": str(run.parent / "tokenizer"),
        "validation": [{"name": "text", "path": str(run.parent / "text")}],
    }
    save_checkpoint(model, small_config(tmp_path, data=data))
    assert call(capsys, "eval", "loss", tmp_path / "run")["loss"] is None
    result = call(capsys, "eval", "needle", tmp_path / "run", "--lengths", 140, "--depths", 2)
    assert result["loss"] == [[None, None]]
    assert "is not finite" in refused(capsys, "generate", tmp_path / "run", "--prompt", "a", "--temperature", 1)


def test_a_folder_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "is not a complete checkpoint" in refused(capsys, "eval", "loss", tmp_path)
    assert "is not a complete checkpoint" in refused(capsys, "generate", tmp_path, "--prompt", "a")


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_two_ranks_report_what_one_does(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    alone = call(capsys, "eval", "loss", run)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "aria_train", "eval", "loss", str(run), "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200, env=environment)
    assert done.returncode == 0
    spread = last_json(done.stdout)
    for name in ("loss", "loss/text", "loss/questions", "loss/pictures"):
        assert spread[name] == pytest.approx(alone[name], rel=1e-6)
