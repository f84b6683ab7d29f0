"""Faults done to a small run on two ranks. Each function returns a row of the table, or raises AssertionError."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aria_train.config import RunConfig, dump_config
from aria_train.errors import EXIT_RESTART, EXIT_USER_ERROR
from aria_train.parallel import checkpoint
from faults import inject
from tests.distributed import RankFailure, launch, run_distributed
from tests.ops.faults import assert_same, run, run_never_seeing, run_with_bad_steps, saved_tensors
from tests.stages.recipe import NAMES, write_stages
from tests.stages.test_interruption import assert_same as assert_same_stages
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

STEPS, INTERVAL = 30, 5


@dataclass
class Row:
    fault: str
    injected: str
    tried: int
    lost: str


class Bench:
    """A folder, a configuration, and the run that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = tiny_config(folder / "alone", unequal_corpora(folder / "corpora"), parallel={"expert_parallel_size": 2})
        values = {"checkpoint": {"interval_steps": INTERVAL, "keep_last": 3}}
        self.base = with_values(
            base, train={"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2}, **values
        )
        run_distributed(run, 2, self.base)
        self.wanted = saved_tensors(checkpoint.folder_of_step(folder / "alone", STEPS))

    def config(self, name: str, **sections: dict[str, Any]) -> RunConfig:
        sections["train"] = {"run_dir": str(self.folder / name), **sections.get("train", {})}
        return with_values(self.base, **sections)

    def arguments(self, config: RunConfig) -> list[str]:
        path = self.folder / f"{Path(config.train.run_dir).name}.yaml"
        path.write_text(dump_config(config))
        return ["train", str(path)]

    def live(self, config: RunConfig, fault: tuple[Any, ...] = ()) -> list[Any]:
        """The run on two ranks, until it ends or the fault ends it: per rank its status and words, or its failure."""
        return launch(inject.live, 2, self.arguments(config), fault, timeout=180)

    def newest(self, config: RunConfig) -> int:
        """Step of the newest intact checkpoint."""
        newest, _ = checkpoint.newest_intact(checkpoint.home_of(config))
        return newest.step if newest is not None else 0

    def steps_lost(self, config: RunConfig) -> int:
        """Steps taken beyond the newest intact checkpoint."""
        metrics = Path(config.train.run_dir, "metrics.jsonl")
        # Whole lines: a kill, or a launcher that has started again, may be amid the last.
        return metrics.read_bytes().count(b"\n") - self.newest(config) if metrics.exists() else 0

    def finish(self, config: RunConfig) -> str:
        """Starts again and runs to the end, which must be that of the run left alone; returns what it said."""
        outcomes = self.live(config)
        assert [status for status, _ in outcomes] == [0, 0], outcomes
        self.assert_same_end(config)
        return str(outcomes[0][1])

    def assert_same_end(self, config: RunConfig) -> None:
        end = checkpoint.folder_of_step(checkpoint.home_of(config), STEPS)
        assert_same(saved_tensors(end), self.wanted)
        assert read_steps(config.train.run_dir) == read_steps(self.base.train.run_dir)


def steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def killed_all(bench: Bench) -> Row:
    worst = 0
    moments = (4, 9, 16, 24)
    for step in moments:
        config = bench.config(f"all-{step}")
        outcomes = bench.live(config, ("in step", step, -1, "SIGKILL"))
        assert all(isinstance(outcome, RankFailure) for outcome in outcomes)
        worst = max(worst, bench.steps_lost(config))
        bench.finish(config)
    return Row("SIGKILL of all ranks", f"in steps {moments}", len(moments), f"at most {steps(worst)}, taken again")


def exits(bench: Bench) -> Row:
    worst = 0
    for rank, step in ((0, 8), (1, 19)):
        config = bench.config(f"exit-{rank}")
        outcomes = bench.live(config, ("in step", step, rank, "exit"))
        assert "exit status 1" in str(outcomes[rank])
        worst = max(worst, bench.steps_lost(config))
        bench.finish(config)
    return Row("a rank exits", "`os._exit(1)` within a step, on either rank", 2, f"{steps(worst)}, taken again")


def killed_in_save(bench: Bench) -> Row:
    worst = 0
    for number, place in enumerate(inject.SAVE_PLACES):
        config = bench.config(f"save-{number}")
        bench.live(config, ("in save", 15, place))
        kept = bench.newest(config)
        assert kept == (15 if place == inject.SAVE_PLACES[-1] else 10), (place, kept)
        worst = max(worst, bench.steps_lost(config))
        bench.finish(config)
    places = "; ".join(inject.SAVE_PLACES)
    return Row(
        "SIGKILL during a save",
        f"on the rank that publishes: {places}",
        len(inject.SAVE_PLACES),
        f"the checkpoint being written; at most {steps(worst)}, taken again",
    )


def killed_in_hand_over(bench: Bench) -> Row:
    paths = write_stages(bench.folder / "stages")

    def curriculum(root: Path, fault: tuple[Any, ...] = ()) -> list[Any]:
        arguments = ["curriculum", *paths, f"train.run_dir={root}", "parallel.expert_parallel_size=2"]
        return launch(inject.live, 2, arguments, fault, timeout=240)

    assert [status for status, _ in curriculum(bench.folder / "stages-alone")] == [0, 0]
    root, tried = bench.folder / "stages-killed", 0
    for before, after in itertools.pairwise(NAMES):
        for place in inject.HAND_OVER_PLACES:
            outcomes = curriculum(root, ("in hand-over", before, after, place))
            assert "SIGKILL" in str(outcomes[0]), (before, place, outcomes)
            tried += 1
    assert [status for status, _ in curriculum(root)] == [0, 0]
    assert_same_stages(root, bench.folder / "stages-alone")
    places = ", ".join(inject.HAND_OVER_PLACES)
    return Row("SIGKILL between stages", f"{places}; at each of three hand-overs of one run", tried, "nothing")


def asked_to_stop(bench: Bench) -> Row:
    tries = (("SIGTERM", 1, 7), ("SIGTERM", 0, 13), ("SIGUSR1", 1, 22), ("SIGINT", 0, 11))
    for name, rank, step in tries:
        config = bench.config(f"{name}-{rank}")
        outcomes = bench.live(config, ("in step", step, rank, name))
        assert [status for status, _ in outcomes] == [EXIT_RESTART] * 2, outcomes
        assert bench.steps_lost(config) == 0
        bench.finish(config)
    return Row("SIGTERM to one rank", "also SIGUSR1 and SIGINT; either rank", len(tries), "nothing: saved, status 75")


def sleeps(bench: Bench) -> Row:
    worst = 0
    for rank in (0, 1):
        config = bench.config(f"sleep-{rank}", guard={"hang_minutes": 0.1})
        outcomes = bench.live(config, ("in step", 13, rank, "sleep"))
        assert f"exit status {EXIT_RESTART}" in str(outcomes), outcomes
        reports = sorted(Path(config.train.run_dir, "logs", "hangs").glob("*/*.txt"))
        told = "\n".join(report.read_text() for report in reports)
        assert "in act" in told, "the stack of the sleeper"
        worst = max(worst, bench.steps_lost(config))
        bench.finish(config)
    return Row(
        "a rank sleeps",
        "for an hour, with `guard.hang_minutes: 0.1`; either rank",
        2,
        f"6 seconds and {steps(worst)}, taken again; the report shows where each rank was; status 75",
    )


def bad_batch(bench: Bench) -> Row:
    for rank, factor in ((0, float("nan")), (1, float("inf"))):
        config, unseen = bench.config(f"bad-{rank}"), bench.config(f"unseen-{rank}")
        run_distributed(run_with_bad_steps, 2, config, {12: factor}, rank)
        run_distributed(run_never_seeing, 2, unseen, {12: 0})
        ends = [checkpoint.folder_of_step(Path(c.train.run_dir), STEPS) for c in (config, unseen)]
        assert_same(saved_tensors(ends[0]), saved_tensors(ends[1]))
        records = Path(config.train.run_dir, "skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in records] == [12]
    return Row(
        "NaN in a batch", "also infinity; on either rank", 2, "that step's update; the rest as if it was never seen"
    )


def flipped_byte(bench: Bench) -> Row:
    chance, tried = random.Random(0), 0
    for name in (".metadata", "manifest.json", "__0_0.distcp", "__1_0.distcp"):
        config = bench.config(f"flip-{tried}")
        bench.live(config, ("in step", 24, -1, "SIGKILL"))
        assert bench.newest(config) == 20
        file = checkpoint.folder_of_step(Path(config.train.run_dir), 20) / name
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        assert bench.newest(config) == 15
        said = bench.finish(config)
        assert "ignored" in said, said
        assert name in said, said
        tried += 1
    return Row(
        "a flipped bit in a checkpoint",
        "in each kind of file, at a random place",
        tried,
        f"the checkpoint, refused by the file's name: {INTERVAL} more steps, taken again from the one before",
    )


def truncated_corpus(bench: Bench) -> Row:
    for suffix in (".bin", ".idx"):
        config = bench.config(f"truncated{suffix}")
        bench.live(config, ("in step", 13, -1, "SIGKILL"))
        file = Path(f"{config.data.train[0].path}{suffix}")
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        outcomes = bench.live(config)
        file.write_bytes(content)
        assert all(status == EXIT_USER_ERROR for status, _ in outcomes), outcomes
        assert any(file.name in words for _, words in outcomes), outcomes
        assert bench.newest(config) == 10
        bench.finish(config)
    return Row(
        "a truncated corpus",
        "half of the `.bin`, half of the `.idx`, before a restart",
        2,
        "nothing: refused by name, status 2; goes on once mended",
    )


def disk_full(bench: Bench) -> Row:
    mount = bench.folder / "tmpfs"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        return Row("disk full during a save", f"not tried: {done.stderr.strip()}", 0, "")
    try:
        config = bench.config("full", checkpoint={"storage": str(mount)})
        size = sum(
            file.stat().st_size for file in checkpoint.folder_of_step(Path(bench.base.train.run_dir), STEPS).iterdir()
        )
        filler = mount / "filler"
        filler.write_bytes(bytes(16 * 2**20 - 2 * size - size // 2))
        outcomes = bench.live(config)
        assert all(status == EXIT_USER_ERROR for status, _ in outcomes), outcomes
        words = " ".join(words for _, words in outcomes)
        assert "no space left on device" in words.lower(), words
        assert bench.newest(config) >= INTERVAL
        taken = len(read_steps(config.train.run_dir))
        assert taken == STEPS, "training went on"
        filler.unlink()
        bench.finish(config)
    finally:
        subprocess.run(["umount", mount], check=True)
    return Row(
        "disk full during a save",
        "`checkpoint.storage` on a tmpfs with room for two and a half checkpoints",
        1,
        "the saves without room; training goes on, ends with status 2, and all before is intact",
    )


def checkpoints_removed(bench: Bench) -> Row:
    config = bench.config("removed")
    outcomes = bench.live(config, ("in step", 13, 0, "remove checkpoints"))
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    bench.assert_same_end(config)
    return Row(
        "checkpoints removed", "the folder, in the middle of a run", 1, "what was removed; the next save goes on"
    )


def killed_one_under_the_launcher(bench: Bench) -> Row:
    """Through `aria_train.elastic`, which starts the ranks again by itself."""
    from faults.launcher import run_and_kill

    config = bench.config("launcher")
    worst = run_and_kill(bench.arguments(config), Path(config.train.run_dir), bench, config, kills=2)
    bench.assert_same_end(config)
    return Row(
        "SIGKILL of one rank",
        "under `python -m aria_train.elastic --max-restarts=3`, twice in one run",
        2,
        f"at most {steps(worst)}, taken again without anyone's help",
    )


def slurm(bench: Bench) -> Row:
    from tests.slurm.cluster import is_installed

    fault = "SLURM preempts and requeues"
    if not is_installed():
        return Row(fault, "not tried: SLURM is not installed (`make slurm-test` installs it)", 0, "")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = ["-m", "pytest", "-q", "tests/slurm", "-p", "no:cacheprovider"]
    import sys

    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    return Row(
        fault,
        "slurmctld and two slurmd on loopback; a job of a higher partition, then the warning before the time limit",
        2,
        "nothing: saved, requeued, went on; final weights bitwise those of a run outside SLURM",
    )


SCENARIOS: list[Callable[[Bench], Row]] = [
    killed_one_under_the_launcher,
    killed_all,
    killed_in_save,
    killed_in_hand_over,
    asked_to_stop,
    exits,
    sleeps,
    disk_full,
    checkpoints_removed,
    flipped_byte,
    truncated_corpus,
    bad_batch,
    slurm,
]
