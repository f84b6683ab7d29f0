"""`aria-train launch CONFIG`: the SLURM script of a run, filled in from its configuration, and its submission."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aria_train.errors import ConfigError


def register(subparsers: Any) -> None:
    """Adds the command to the command line; imports nothing heavy."""
    launch = subparsers.add_parser(
        "launch",
        help="submit a stage, or a curriculum, to SLURM",
        description="Fills in launch/slurm.sbatch from the `launch` section of the (first) stage's YAML, keeps it in "
        "the run directory, and submits it.",
    )
    launch.add_argument(
        "arguments", nargs="+", metavar="CONFIG | section.key=value", help="one stage, or several for a curriculum"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    launch.set_defaults(run=run_launch)


def run_launch(args: argparse.Namespace) -> None:
    """Submits the run, and says how to follow it."""
    script, run_dir = render(args.arguments)
    if args.dry_run:
        print(script, end="")
        return
    path = run_dir / "launch.sbatch"
    try:
        (run_dir / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"train.run_dir {run_dir} cannot be written to: {error.strerror}.") from None
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ConfigError(
            "sbatch is not on this machine. Submit from a login node of the cluster, see the script with --dry-run, or "
            "train without SLURM: launch/torchrun.sh."
        ) from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"SLURM refuses {path}: {' '.join(error.stderr.split())}") from None
    job = done.stdout.strip().split(";")[0]
    print(f"submitted job {job}: {path}\nits log: {run_dir}/logs/slurm/job-{job}.log; the nodes': beside it")


def render(arguments: Sequence[str]) -> tuple[str, Path]:
    """The script of a run, and its run directory. Raises ConfigError for what could not run."""
    from aria_train.config import check_world
    from aria_train.stages.stage import load_run, run_root, split_arguments

    command = "curriculum" if len(split_arguments(arguments)[0]) > 1 else "train"
    stages = load_run(command, arguments)
    config, launch = stages[0].config, stages[0].config.launch
    for stage in stages:
        check_world(stage.config, launch.nodes * launch.ranks_per_node)
    run_dir = run_root(stages) if command == "curriculum" else stages[0].run_dir
    options: dict[str, str | int] = {
        "job-name": re.sub(r"[^\w.-]", "-", command if command == "curriculum" else config.stage),
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "time": launch.time_limit,
        "signal": f"B:USR1@{launch.warning_seconds}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{run_dir}/logs/slurm/job-%j.log",
    }
    named = launch.sbatch.keys()
    if config.train.device != "cpu" and not any(key == "gres" or key.startswith("gpus") for key in named):
        options["gpus-per-node"] = launch.ranks_per_node
    values = {
        "arguments": "(" + " ".join(map(shlex.quote, [command, *arguments])) + ")",
        "ranks_per_node": str(launch.ranks_per_node),
        "max_restarts": str(launch.max_restarts),
        "python": shlex.quote(launch.python),
        "logs": shlex.quote(f"{run_dir}/logs/slurm"),
        "setup": shlex.quote("\n".join(launch.setup)),
    }
    return _fill(_template(), options | launch.sbatch, values), run_dir


def _fill(template: str, options: dict[str, str | int], values: dict[str, str]) -> str:
    """Puts the options in place of the template's #SBATCH lines, and values in place of what variables are set to."""
    lines: list[str] = []
    # sbatch reads these lines with a shell's quotes.
    pending = [
        f"#SBATCH --{key}" + (f"={shlex.quote(str(value))}" if value != "" else "") for key, value in options.items()
    ]
    for line in template.splitlines():
        if line.startswith("#SBATCH"):
            lines += pending
            pending = []
            continue
        variable = line.partition("=")[0]
        lines.append(f"{variable}={values[variable]}" if variable in values else line)
    assert not pending, "the template has #SBATCH lines"
    return "\n".join(lines) + "\n"


def _template() -> str:
    package = Path(__file__).resolve().parent
    for folder in (package / "scripts", package.parent / "launch"):
        if (folder / "slurm.sbatch").is_file():
            return (folder / "slurm.sbatch").read_text(encoding="utf-8")
    raise AssertionError("launch/slurm.sbatch is part of the package")
