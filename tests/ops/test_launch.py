"""What is handed to SLURM: the right script, or none where it could not run; and what nodes are asked first."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from aria_train import preflight
from aria_train.cli import main
from tests.tiny import tiny_config

SCRIPTS = Path(__file__).resolve().parents[2] / "launch"


def stage(folder: Path, **launch: Any) -> str:
    """A stage's file whose run directory has a blank and a quote in its name."""
    config = tiny_config(folder / "the run's", [{"name": "a", "path": "nowhere"}])
    data = config.model_dump(mode="json")
    data["launch"].update({"nodes": 2, "ranks_per_node": 2} | launch)
    data["parallel"]["expert_parallel_size"] = 2
    path = folder / "a stage.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_shellcheck_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rendered = tmp_path / "rendered.sh"
    rendered.write_text(dry_run(capsys, stage(tmp_path, setup=["module load cuda", 'echo "it\'s"'])))
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")
    done = subprocess.run([shellcheck, SCRIPTS / "torchrun.sh", rendered], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage(tmp_path, warning_seconds=120)
    script = dry_run(capsys, path, "train.seed=4")
    assert os.listdir(tmp_path) == ["a stage.yaml"]
    logs = f"{tmp_path}/the run's/logs/slurm"
    assert options(script) == [
        "--job-name=tiny",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=24:00:00",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(f'{logs}/job-%j.log')}",
    ]
    assert f"arguments=(train {shlex.quote(path)} train.seed=4)" in script.splitlines()
    assert f"logs={shlex.quote(logs)}" in script.splitlines()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_gpus_are_asked_for_unless_the_run_is_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage(tmp_path)
    assert "--gpus-per-node=2" in options(dry_run(capsys, path, "train.device=auto"))
    assert "--gpus-per-node=2" not in options(dry_run(capsys, path, "train.device=cpu"))
    named = dry_run(capsys, path, "train.device=cuda", "launch.sbatch={gres: 'gpu:h100:2', time: 60, exclusive: ''}")
    assert [o for o in options(named) if o.startswith(("--g", "--ti", "--ex"))] == [
        "--time=60",
        "--gres=gpu:h100:2",
        "--exclusive",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launch.nodes=1", "launch"),  # 2 ranks: fits
        ("launch.nodes=5", "train.global_batch_size 12 is not divisible by 10 rank(s)"),
        ("launch.ranks_per_node=3", "parallel.zero_group_size"),
        ("launch.sbatch={array: 1-4}", "several times at once"),
        ("launch.sbatch={'part ition': a}", "an option of sbatch without its dashes"),
        ('launch.sbatch={partition: "a\\nrm"}', "an option of sbatch"),
        ("launch.job=x", "unknown key"),
    ],
)
def test_what_could_not_run_is_refused_before_it_queues(
    override: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [stage(tmp_path), override]
    if override.startswith("launch.ranks"):
        arguments += ["parallel.expert_parallel_size=1", "parallel.zero_group_size=4"]
    status = main(["launch", "--dry-run", *arguments])
    told = capsys.readouterr()
    assert status == (0 if said == "launch" else 2)
    assert said in told.out + told.err


def test_several_stages_are_a_curriculum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = stage(tmp_path)
    second = shutil.copy(first, tmp_path / "second.yaml")
    script = dry_run(capsys, first, str(second), f"train.run_dir={tmp_path}/runs")
    assert "arguments=(curriculum " in script
    assert f"logs={tmp_path}/runs/logs/slurm" in script.splitlines()


def fake_sbatch(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, "echo '4711;cluster'", monkeypatch)
    path = stage(tmp_path)
    assert main(["launch", path]) == 0
    said = capsys.readouterr().out
    assert "submitted job 4711" in said
    kept = tmp_path / "the run's" / "launch.sbatch"
    assert kept.read_text() == dry_run(capsys, path)
    # SLURM opens its log before the script runs.
    assert (tmp_path / "the run's" / "logs" / "slurm").is_dir()


def test_what_slurm_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, "echo 'sbatch: error: invalid partition' >&2; exit 1", monkeypatch)
    assert main(["launch", stage(tmp_path)]) == 2
    assert "sbatch: error: invalid partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", stage(tmp_path)]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def test_a_node_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage(tmp_path)
    assert preflight.main(["--ranks", "2", "train", path]) == 0
    assert "no GPUs in use" in capsys.readouterr().out
    assert preflight.main(["--ranks", "2", "train", path, "train.seed=x"]) == 2
    assert "train.seed" in capsys.readouterr().err
    assert preflight.main(["--ranks", "2", "train", path, f"train.run_dir={tmp_path}/one"]) == 0
    assert preflight.main(["--ranks", "2", "curriculum", path, f"train.run_dir={tmp_path}/several"]) == 0
    assert f"free for {tmp_path}/several/a stage" in capsys.readouterr().out
    assert os.listdir(tmp_path / "one") == []
    (tmp_path / "file").write_text("")
    assert preflight.main(["--ranks", "2", "train", path, f"train.run_dir={tmp_path}/file/run"]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_torchrun_script_refuses_what_it_cannot_start(tmp_path: Path) -> None:
    script = str(SCRIPTS / "torchrun.sh")
    told = subprocess.run([script], capture_output=True, text=True)
    assert told.returncode == 2
    assert "RANKS_PER_NODE" in told.stderr
    several = os.environ | {"NODES": "2", "RANKS_PER_NODE": "1"}
    told = subprocess.run([script, "train", "x.yaml"], capture_output=True, text=True, env=several)
    assert told.returncode == 2
    assert "RENDEZVOUS=host:port" in told.stderr
