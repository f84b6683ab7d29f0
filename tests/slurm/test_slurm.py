"""A run under a real SLURM of two nodes: preempted, requeued, warned, and bit for bit the run that was left alone."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aria_train.cli import main
from aria_train.config import RunConfig, dump_config
from aria_train.parallel import checkpoint
from tests.distributed import run_distributed
from tests.ops.faults import assert_same, run, saved_tensors
from tests.slurm.cluster import Slurm, cluster, is_installed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not is_installed(), reason="needs SLURM; `make slurm-test` installs it"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
PATIENCE = 400
"""Seconds; a machine may be busy."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as started:
        yield started


def config_of(run_dir: Path, corpora: Path) -> RunConfig:
    """One rank per node; slow enough to be interrupted, in a folder whose name has a blank."""
    config = tiny_config(run_dir, unequal_corpora(corpora), parallel={"expert_parallel_size": 2})
    launch = {
        "nodes": 2,
        "ranks_per_node": 1,
        "time_limit": "30",
        "python": sys.executable,
        "setup": [f"cd '{ROOT}'", "export OMP_NUM_THREADS=1"],
        "sbatch": {"partition": "low"},
    }
    return with_values(
        config, train={"max_steps": STEPS}, checkpoint={"interval_steps": 10, "keep_last": 99}, launch=launch
    )


def wait_until(condition: Callable[[], bool], seconds: float, logs: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            texts = "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in sorted(logs.glob("*.log")))
            raise AssertionError(f"it does not come to that within {seconds} s:\n{texts}")
        time.sleep(0.2)


def steps_done(config: RunConfig) -> int:
    # Whole lines: the last one may be being written.
    metrics = Path(config.train.run_dir, "metrics.jsonl")
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def field(slurm: Slurm, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", job))
    return found[1] if found else ""


def test_a_preempted_job_goes_on_to_the_same_end(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "the run", tmp_path / "corpora")
    stage, logs = tmp_path / "stage.yaml", Path(config.train.run_dir) / "logs" / "slurm"
    stage.write_text(dump_config(config))
    assert main(["launch", str(stage)]) == 0
    said = re.search(r"submitted job (\d+)", capsys.readouterr().out)
    assert said is not None
    job = said[1]

    wait_until(lambda: steps_done(config) >= 12, PATIENCE, logs)
    # Another job takes the nodes; this one is warned, saves, and queues again.
    slurm("sbatch", "--partition=high", "--nodes=2", f"--output={tmp_path}/other.log", "--wrap=sleep 2")
    wait_until(lambda: field(slurm, job, "Restarts") == "1", PATIENCE, logs)
    saved = checkpoint.latest(Path(config.train.run_dir))[0]
    assert saved is not None
    stopped_after = saved.step
    assert stopped_after < STEPS
    assert steps_done(config) == stopped_after, "no step was lost"

    wait_until(lambda: steps_done(config) > stopped_after + 5, PATIENCE, logs)
    # The warning before the time limit goes to the script, and to nobody else.
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: field(slurm, job, "Restarts") == "2", PATIENCE, logs)
    wait_until(lambda: field(slurm, job, "JobState") == "COMPLETED", PATIENCE, logs)

    log = (logs / f"job-{job}.log").read_text()
    assert log.count("saved with work left; the job goes back to the queue") == 2
    assert "done" in log
    for attempt in range(3):
        assert len(list(logs.glob(f"job-{job}-try-{attempt}-node-[01]-*.log"))) == 2

    alone = with_values(config, train={"run_dir": str(tmp_path / "alone")})
    run_distributed(run, 2, alone)
    assert read_steps(config.train.run_dir) == read_steps(alone.train.run_dir)
    ends = [checkpoint.folder_of_step(Path(c.train.run_dir), STEPS) for c in (config, alone)]
    assert_same(saved_tensors(ends[0]), saved_tensors(ends[1]))


def test_a_node_that_is_not_fit_ends_the_job_with_a_reason(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", tmp_path / "corpora")
    stage, logs = tmp_path / "stage.yaml", tmp_path / "run" / "logs" / "slurm"
    stage.write_text(dump_config(with_values(config, train={"device": "cuda"})))
    assert main(["launch", str(stage), "launch.sbatch={partition: low, gpus-per-node: 0}"]) == 0
    job = re.findall(r"submitted job (\d+)", capsys.readouterr().out)[0]
    wait_until(lambda: field(slurm, job, "JobState") == "FAILED", PATIENCE, logs)
    assert field(slurm, job, "ExitCode") == "2:0"
    log = (logs / f"job-{job}.log").read_text()
    assert "0 GPU(s) to be seen for 1 ranks" in log
    assert "the environment is not fit for this run" in log
