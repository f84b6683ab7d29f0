"""Which checkpoint a run goes on from, under which configurations, and which weights a new run takes over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from aria_train.config import RunConfig
from aria_train.errors import CheckpointError
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint.manifest import decode, encode
from tests.tiny import random_documents, read_steps, tiny_config, unequal_corpora, with_values, write_corpus


def run(config: RunConfig) -> None:
    from aria_train.train.session import run_stage

    run_stage(config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return unequal_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def finished(sources: Any, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 4 steps on this process alone, with a checkpoint after each; tests work on copies of it."""
    config = tiny_config(tmp_path_factory.mktemp("finished") / "run", sources, parallel={"expert_parallel_size": 1})
    config = with_values(
        config,
        model={"num_layers": 1},
        train={"global_batch_size": 4, "max_steps": 4},
        checkpoint={"interval_steps": 1, "keep_last": 4},
    )
    run(config)
    return config


@pytest.fixture
def copy(finished: RunConfig, tmp_path: Path) -> RunConfig:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.train.run_dir, run_dir)
    return with_values(finished, train={"run_dir": str(run_dir)})


def folders(config: RunConfig) -> list[str]:
    return sorted(p.name for p in (Path(config.train.run_dir) / "checkpoints").iterdir())


def contents(run_dir: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted(Path(run_dir).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Torn and damaged checkpoints


def test_an_interrupted_saving_is_named_and_ignored(copy: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = Path(copy.train.run_dir) / "checkpoints"
    (shelf / "step_00000004").rename(shelf / "step_00000004.writing")
    run(copy)
    out = " ".join(capsys.readouterr().out.split())
    assert "ignored" in out
    assert "step_00000004.writing" in out
    assert "its writing was interrupted" in out
    assert "resumed from" in out
    assert folders(copy) == [f"step_{n:08d}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("damage", ["shortened", "missing", "no manifest", "half a manifest", "flipped byte"])
def test_a_damaged_checkpoint_is_named_and_ignored(
    damage: str, copy: RunConfig, finished: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = Path(copy.train.run_dir) / "checkpoints" / "step_00000004"
    data, manifest = next(newest.glob("*.distcp")), newest / "manifest.json"
    if damage == "shortened":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "missing":
        data.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:200])
    else:
        whole = bytearray(data.read_bytes())
        whole[len(whole) // 2] ^= 1
        data.write_bytes(whole)
    run(copy)
    out = " ".join(capsys.readouterr().out.split())
    assert "ignored" in out
    assert "step_00000004" in out
    assert read_steps(copy.train.run_dir) == read_steps(finished.train.run_dir)
    checkpoint.read_manifest(newest)


def test_damaged_checkpoints_do_not_count_among_those_kept(copy: RunConfig) -> None:
    """Pruning by name alone would keep the damaged newest and remove the good one the run goes on from."""
    config = with_values(copy, train={"max_steps": 3}, checkpoint={"keep_last": 1})
    shelf = Path(config.train.run_dir) / "checkpoints"
    for step in (2, 3):
        shutil.rmtree(shelf / f"step_{step:08d}")
    (shelf / "step_00000004" / "manifest.json").unlink()
    run(config)
    newest, _ = checkpoint.latest(Path(config.train.run_dir))
    assert newest is not None
    assert newest.step == 3


def test_only_the_last_checkpoints_are_kept(finished: RunConfig, tmp_path: Path) -> None:
    config = with_values(finished, train={"run_dir": str(tmp_path)}, checkpoint={"keep_last": 2})
    run(config)
    assert folders(config) == ["step_00000003", "step_00000004"]


def test_the_last_step_is_saved_without_an_interval(finished: RunConfig, tmp_path: Path) -> None:
    config = with_values(finished, train={"run_dir": str(tmp_path)}, checkpoint={"interval_steps": 0})
    run(config)
    assert folders(config) == ["step_00000004"]


def test_a_complete_run_is_left_alone(copy: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy.train.run_dir)
    run(copy)
    assert "already complete: 4 of 4 steps" in capsys.readouterr().out
    assert contents(copy.train.run_dir).keys() == before.keys()
    assert {k: v for k, v in contents(copy.train.run_dir).items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }


def test_a_run_can_be_made_longer(copy: RunConfig, finished: RunConfig, tmp_path: Path) -> None:
    longer = with_values(copy, train={"max_steps": 6})
    run(longer)
    at_once = with_values(longer, train={"run_dir": str(tmp_path / "at once")})
    run(at_once)
    assert read_steps(longer.train.run_dir) == read_steps(at_once.train.run_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations that may go on, and those that may not


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "weight_decay", 0.0),
        ("optimizer", "lr_scale", {"decoder": 0.5}),
        ("train", "seed", 4),
        ("train", "global_batch_size", 8),
        ("train", "context_length", 16),
        ("model", "top_k", 1),
        ("model", "rope_base", 2000.0),
        ("model", "balance_group_size", 4),
        ("model", "z_coefficient", 0.0),
    ],
)
def test_a_change_that_makes_another_run_is_refused(section: str, key: str, value: Any, copy: RunConfig) -> None:
    before = contents(copy.train.run_dir)
    with pytest.raises(CheckpointError, match="cannot be resumed") as caught:
        run(with_values(copy, **{section: {key: value}}, **({"train": {"max_steps": 6}} if section != "train" else {})))
    assert f"{section}.{key}" in str(caught.value)
    assert "checkpoint.init_from" in str(caught.value)
    assert contents(copy.train.run_dir) == before


def test_another_learning_rate_is_said(copy: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    changed = with_values(copy, train={"max_steps": 5}, optimizer={"lr": 1e-3}, schedule={"total_tokens": 5000})
    run(changed)
    line = "the learning rate changes from step 5 on: optimizer.lr 0.002 -> 0.001, schedule.total_tokens 4000 -> 5000"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert read_steps(changed.train.run_dir)[-1]["lr"] < 1e-3
    run(with_values(changed, train={"max_steps": 6}))
    assert "learning rate" not in capsys.readouterr().out


def test_a_length_that_the_schedule_follows_is_said(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the two limits the one that comes first."""
    config = with_values(
        finished,
        train={"run_dir": str(tmp_path), "max_tokens": 9999},
        schedule={"warmup_tokens": 0, "total_tokens": None},
    )
    run(config)
    assert read_steps(tmp_path)[-1]["lr"] == pytest.approx(2e-4)
    capsys.readouterr()
    run(with_values(config, train={"max_steps": 6}))
    assert "from step 5 on: schedule.total_tokens 512 -> 768" in capsys.readouterr().out
    assert read_steps(tmp_path)[-1]["lr"] == pytest.approx(2e-4)


def test_other_sources_weights_or_order_are_refused(copy: RunConfig, sources: Any) -> None:
    long, short = sources
    for changed in ([long], [short, long], [long, {**short, "weight": 3.0}], [long, {**short, "name": "other"}]):
        with pytest.raises(CheckpointError, match="data.train"):
            run(with_values(copy, data={"train": changed}))


def test_a_corpus_that_has_grown_is_refused_and_one_that_has_moved_is_not(
    copy: RunConfig, sources: Any, tmp_path: Path
) -> None:
    long, short = sources
    for suffix in (".bin", ".idx"):
        shutil.copy(long["path"] + suffix, tmp_path / f"moved{suffix}")
    moved = [{**long, "path": str(tmp_path / "moved")}, short]
    longer = with_values(copy, train={"max_steps": 5}, data={"train": moved})
    run(longer)
    assert len(read_steps(longer.train.run_dir)) == 5
    # As many windows and the same configuration, but other tokens; and the same tokens in another order.
    other = write_corpus(
        tmp_path / "other", [[95 - token for token in d] for d in random_documents(90, 17, 33, seed=1)]
    )
    with pytest.raises(CheckpointError, match="data.train.long: another corpus"):
        run(with_values(longer, train={"max_steps": 6}, data={"train": [{**long, "path": other}, short]}))
    grown = [{**long, "path": [long["path"], short["path"]]}, short]
    with pytest.raises(CheckpointError, match="data.train.long"):
        run(with_values(longer, train={"max_steps": 6}, data={"train": grown}))


def test_parts_of_a_corpus_in_another_order_are_refused(finished: RunConfig, sources: Any, tmp_path: Path) -> None:
    paths = [source["path"] for source in sources]
    config = with_values(finished, train={"run_dir": str(tmp_path)}, data={"train": [{"name": "both", "path": paths}]})
    run(config)
    with pytest.raises(CheckpointError, match="data.train.both: another corpus than the checkpoint's, or its parts in"):
        run(with_values(config, data={"train": [{"name": "both", "path": paths[::-1]}]}))


def test_a_checkpoint_of_an_older_version_is_resumed(copy: RunConfig) -> None:
    """Which says nothing of its corpora."""
    file = Path(copy.train.run_dir) / "checkpoints" / "step_00000004" / "manifest.json"
    manifest = decode(file.read_bytes())
    assert set(manifest.fingerprints) == {"long", "short"}
    manifest.fingerprints = {}
    file.write_bytes(encode(manifest))
    assert b"fingerprints" not in file.read_bytes()
    run(with_values(copy, train={"max_steps": 5}))
    assert len(read_steps(copy.train.run_dir)) == 5


def test_layout_logging_and_speed_may_change(copy: RunConfig) -> None:
    changed = with_values(
        copy,
        train={"max_steps": 5, "micro_batch_size": 2, "recompute": "full", "eval_interval_steps": 2},
        data={"workers": 2, "prefetch_batches": 1},
        logging={"interval_steps": 5},
        checkpoint={"interval_steps": 3, "keep_last": 1},
        parallel={"zero_group_size": 1},
        evaluation={"interval_steps": 3},
    )
    run(changed)
    assert [line["step"] for line in read_steps(changed.train.run_dir)] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Weights of another run


def test_a_new_run_takes_over_the_weights_and_nothing_else(finished: RunConfig, tmp_path: Path) -> None:
    start = str(Path(finished.train.run_dir) / "checkpoints" / "step_00000003")
    config = with_values(
        finished,
        train={"run_dir": str(tmp_path / "new"), "max_steps": 1, "seed": 9},
        # No step is small enough to tell the weights apart.
        optimizer={"lr": 1e-30},
        checkpoint={"init_from": start},
    )
    run(config)
    tensors = saved(Path(config.train.run_dir)), saved(Path(finished.train.run_dir), "step_00000003")
    names = [name for name in tensors[1] if name.startswith("model.")]
    assert names
    for name in names:
        torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0, atol=1e-12)
    # The moments are those of a first step, not of a fourth.
    fresh = with_values(config, train={"run_dir": str(tmp_path / "again")})
    run(fresh)
    again = saved(Path(fresh.train.run_dir))
    assert all(torch.equal(again[name], tensors[0][name]) for name in again)
    assert not torch.equal(tensors[0]["optimizer.head.weight.exp_avg"], tensors[1]["optimizer.head.weight.exp_avg"])


def test_init_from_takes_a_run_directory(finished: RunConfig, tmp_path: Path, capsys: Any) -> None:
    config = with_values(
        finished,
        train={"run_dir": str(tmp_path), "max_steps": 1},
        checkpoint={"init_from": finished.train.run_dir},
    )
    run(config)
    assert "step_00000004" in "".join(capsys.readouterr().out.split())


def test_weights_of_another_model_are_refused(finished: RunConfig, tmp_path: Path) -> None:
    for change, problem in (
        ({"num_layers": 2}, "missing"),
        ({"num_shared_experts": 0}, "too many"),
        ({"expert_size": 8}, "of another shape"),
    ):
        config = with_values(
            finished,
            model=change,
            train={"run_dir": str(tmp_path / "new")},
            checkpoint={"init_from": finished.train.run_dir},
        )
        with pytest.raises(CheckpointError, match=problem):
            run(config)
        assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_a_checkpoint_that_is_not_there_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name in ("nowhere", "empty"):
        config = with_values(
            finished,
            train={"run_dir": str(tmp_path / "new")},
            checkpoint={"init_from": str(tmp_path / name)},
        )
        with pytest.raises(CheckpointError, match=name):
            run(config)


def saved(run_dir: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    from tests.train.test_resume import saved_tensors

    newest, _ = checkpoint.latest(run_dir)
    assert newest is not None
    return saved_tensors(run_dir / "checkpoints" / name if name else newest.folder)
