"""What cannot work is refused before the first stage starts, all of it at once; and the paper's recipe is shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aria_train.cli import main
from aria_train.config import load_config
from aria_train.errors import ConfigError
from aria_train.stages.checks import check
from aria_train.stages.stage import load_stages, split_arguments
from tests.stages.recipe import NAMES, VISION, conversations, write_stages, write_text

FULL_SIZE = [f"configs/{name}.yaml" for name in ("stage1_lang", "stage2_mm", "stage3_longctx", "stage4_post")]
ONE, TWO, THREE, FOUR = NAMES


def refusal(capsys: pytest.CaptureFixture[str], paths: list[str], *arguments: str) -> str:
    """What the command says when it refuses."""
    assert main(["curriculum", *paths, *arguments]) == 2
    return capsys.readouterr().err


def report_of(folder: Path, **changes: dict[str, Any]) -> Any:
    paths = write_stages(folder, **changes)
    return check(load_stages(paths, [f"train.run_dir={folder}/runs"]))


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def test_dry_run_shows_the_papers_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    paths = [str(root / path) for path in FULL_SIZE]
    monkeypatch.chdir(tmp_path)
    assert main(["curriculum", *paths, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    name = ""
    rows: dict[str, list[str]] = {}
    mixtures: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if not (cells := _cells(line)):
            continue
        name = cells[0] if cells[0].startswith("stage") else name
        rows.setdefault(name, cells)
        mixtures.setdefault(name, []).append(cells[6])
    assert [rows[name][1:4] for name in ("stage1_lang", "stage2_mm", "stage3_longctx", "stage4_post")] == [
        ["8K", "100K", "6.4T"],
        ["8K", "100K", "1.4T"],
        ["64K", "5M", "33B"],
        ["64K", "5M", "20B"],
    ]
    assert {name: [row for row in mixture if row] for name, mixture in mixtures.items()} == {
        "stage1_lang": ["100.0% text"],
        # Of billions of tokens: 1000 of language; 190, 70, 102 and 35 of images and text (paper, section 3.2).
        "stage2_mm": ["71.6% language", "13.6% interleaved_web", "5.0% synthetic_captions", "7.3% documents",
                      "2.5% video"],
        # 12 of language and 21 of images and text; 24.2 + 15.2 + 14.5 + 15.2 = 69% long.
        "stage3_longctx": ["24.2% language_long", "12.1% language_short", "15.2% video_long", "14.5% documents_long",
                           "15.2% images_then_captions", "18.8% multimodal_short"],
        "stage4_post": ["20.0% text_instructions", "10.0% code", "10.0% mathematics", "20.0% image_questions",
                        "10.0% image_conversations", "15.0% documents_charts_tables", "5.0% several_images",
                        "7.5% video_questions", "2.5% long_documents"],
    }  # fmt: skip
    assert [rows[name][7].split()[0] for name in list(rows)[1:]] == ["stage1_lang", "stage2_mm", "stage3_longctx"]
    assert "do not exist" in shown
    assert not any(tmp_path.iterdir()), "a dry run leaves nothing"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_stage_3_is_69_percent_long() -> None:
    sources = load_config(Path(__file__).parents[2] / FULL_SIZE[2]).data.train
    long = sum(s.weight for s in sources if s.concatenate or (s.min_tokens or 0) >= 16384)
    language = sum(s.weight for s in sources if s.name.startswith("language"))
    assert sum(s.weight for s in sources) == pytest.approx(33)
    assert long / 33 == pytest.approx(0.69, abs=0.002)
    assert language == pytest.approx(12)


def test_a_curriculum_that_works_has_no_problems(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert (report.problems, report.absent) == ([], [])


def test_files_and_overrides_come_in_any_order() -> None:
    assert split_arguments(["a.yaml", "train.seed=1", "b/c=d.yaml", "data.train.0.weight=2"]) == (
        ["a.yaml", "b/c=d.yaml"],
        ["train.seed=1", "data.train.0.weight=2"],
    )


def test_stages_share_a_root_named_after_their_files(tmp_path: Path) -> None:
    paths = write_stages(tmp_path)
    stages = load_stages(paths, ["train.run_dir=runs/x", "train.seed=5"])
    assert [str(stage.run_dir) for stage in stages] == [f"runs/x/{name}" for name in NAMES]
    assert [stage.config.train.seed for stage in stages] == [5] * 4
    assert stages[0].config.checkpoint.init_from is None
    assert stages[1].config.checkpoint.init_from == f"runs/x/{ONE}/checkpoints/step_00000005"


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_everything_wrong_is_said_at_once_and_nothing_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A smaller model, another vocabulary, a corpus that is not there, a context below what is packed."""
    long_chats = conversations(tmp_path / "elsewhere" / "long_chat", count=95, longest=100)
    paths = write_stages(
        tmp_path / "stages",
        **{
            TWO: {"model.hidden_size": 16, "model.head_dim": 4},
            THREE: {"model.vocab_size": 128, "model.rope_base": 500.0},
            FOUR: {
                "model.vocab_size": 128,
                "train.context_length": 48,
                "data.train": [
                    {"name": "chat", "path": long_chats},
                    {"name": "gone", "path": str(tmp_path / "nowhere" / "corpus")},
                ],
            },
        },
    )
    said = refusal(capsys, paths, f"train.run_dir={tmp_path}/runs")
    for part in (
        f"{TWO}: model.hidden_size: 32 before, 16 now; model.head_dim: 8 before, 4 now",
        f"{THREE}: model.vocab_size: 96 before, 128 now",
        f"{THREE}: model.rope_base falls from 1,000",
        f"{FOUR}: source 'gone'",
        "tokens, which are not cut, and train.context_length is 48, down from 128",
    ):
        assert part in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TWO: {"checkpoint.init_fresh": ["vision"]}}, f"{ONE} has no projector to hand over"),
        ({TWO: {"checkpoint.init_fresh": []}}, f"{ONE} has no projector and no vision to hand over"),
        ({THREE: {"model.vision.num_layers": 2}}, "model.vision.num_layers: 1 before, 2 now"),
        ({ONE: {"checkpoint.init_optimizer": True}}, "the first stage has no checkpoint.init_from"),
        ({FOUR: {"data.train": []}}, f"{FOUR}: data.train names no source"),
        ({ONE: {"evaluation.experts": True}}, f"{ONE}: the map of experts (evaluation.experts) compares visual"),
        ({TWO: {"evaluation.experts": True}}, f"{TWO}: evaluation.experts counts over data.validation, which names"),
    ],
)
def test_hand_overs_that_cannot_be(tmp_path: Path, changes: dict[str, dict[str, Any]], message: str) -> None:
    report = report_of(tmp_path, **changes)
    assert any(message in problem for problem in report.problems), report


@pytest.mark.parametrize(
    ("last", "message"),
    [("elsewhere/four", "do not lie in one folder"), ("runs/three", "several stages would train in")],
)
def test_run_directories_lie_side_by_side(tmp_path: Path, last: str, message: str) -> None:
    folders = dict(zip(NAMES, ("runs/one", "runs/two", "runs/three", last)))
    paths = write_stages(tmp_path, **{name: {"train.run_dir": folder} for name, folder in folders.items()})
    with pytest.raises(ConfigError, match=message):
        load_stages(paths, [])


def test_a_file_is_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_stages(tmp_path)
    (tmp_path / "file").write_text("precious")
    for command in (["curriculum"], ["launch", "launch.ranks_per_node=1"]):
        assert main([*command, *paths, f"train.run_dir={tmp_path}/file"]) == 2
        assert "file cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_store_has_a_place_for_every_stage(tmp_path: Path) -> None:
    stages = load_stages(write_stages(tmp_path), ["train.run_dir='runs'", "checkpoint.storage=memory://bucket/run/"])
    assert [stage.config.train.run_dir for stage in stages] == [f"runs/{stage.name}" for stage in stages]
    assert stages[1].config.checkpoint.init_from == f"memory://bucket/run/{ONE}/checkpoints/step_00000005"


def test_vision_is_not_dropped_and_not_taken_for_free(tmp_path: Path) -> None:
    report = report_of(tmp_path, **{FOUR: {"model.vision": None}})
    assert any("model.vision: given before, None now" in problem for problem in report.problems)
    assert any("holds 20 images, but the model has no vision encoder" in sentence for sentence in report.absent)


def test_one_tokenizer_for_all(tmp_path: Path) -> None:
    paths = write_stages(tmp_path)
    for prefix, mark in (("long", "a" * 64), ("short", "b" * 64)):
        (tmp_path / "data" / f"{prefix}.json").write_text(f'{{"tokenizer_sha256": "{mark}", "vocabulary_size": 90}}')
    report = check(load_stages(paths, [f"train.run_dir={tmp_path}/runs"]))
    assert any("not one tokenizer but 2" in problem for problem in report.problems), report


def test_every_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = write_stages(tmp_path, **{TWO: {"train.context": 5}, FOUR: {"model.top_k": 99}})
    said = refusal(capsys, [*paths, str(tmp_path / "five.yaml")])
    for part in ("train.context: unknown key", "top_k 99 exceeds num_experts 8", "five.yaml: no such configuration"):
        assert part in said


def test_ranks_are_checked_for_every_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_stages(tmp_path, **{THREE: {"train.global_batch_size": 3}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(capsys, paths, f"train.run_dir={tmp_path}/runs")
    assert f"{THREE}: train.global_batch_size 3 is not divisible by 2 rank(s)" in said


def test_a_missing_file_does_not_hide_behind_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = write_stages(tmp_path)
    shutil.rmtree(tmp_path / "data" / "chat")
    assert main(["curriculum", *paths, f"train.run_dir={tmp_path}/runs", "--dry-run"]) == 0
    assert f"missing  {FOUR}: source 'chat'" in capsys.readouterr().out
    assert f"{FOUR}: source 'chat'" in refusal(capsys, paths, f"train.run_dir={tmp_path}/runs")


def test_what_works_but_should_be_known_is_noted(tmp_path: Path) -> None:
    report = report_of(tmp_path, **{THREE: {"model.rope_base": 1000.0, "schedule": {}}, FOUR: {"model.rope_base": 1e6}})
    assert report.problems == []
    assert any(f"{THREE}: the context grows 4 times and model.rope_base stays 1,000" in note for note in report.notes)


def test_text_alone_may_shrink(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", 50, 20, 150)
    source = [{"name": "text", "path": text}]
    changes = {"model.vision": VISION, "data.train": source, "train.context_length": 16}
    assert report_of(tmp_path / "stages", **{FOUR: changes}).problems == []
