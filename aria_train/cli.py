"""The `aria-train` command. Heavy imports stay inside the functions that need them: `--help` must be instant."""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from collections.abc import Sequence
from typing import Any

from aria_train.arguments import command, local_path
from aria_train.elastic import leave_stopped
from aria_train.errors import EXIT_BROKEN_PIPE, EXIT_USER_ERROR, Stopped, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 2 the user can mend it, 75 start it again to go on."""
    args = parse(arguments)
    try:
        args.run(args)
        print(end="", flush=True)
    except UserError as error:
        _print_error(error)
        return EXIT_USER_ERROR
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"aria-train: {stop}; the same command goes on from there.", file=sys.stderr, flush=True)
        return leave_stopped()
    except KeyboardInterrupt:
        again = "goes on from the last checkpoint" if getattr(args, "resumes", False) else "begins anew"
        print(f"aria-train: interrupted; the same command {again}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _is_reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
        return EXIT_BROKEN_PIPE
    return 0


def _is_reader_gone() -> bool:
    """Whether what stdout was piped into has ended, as in `| head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, amid and after the words of a command; argparse alone takes the first run of words."""
    parser = _build_parser()
    args, rest = parser.parse_known_args(arguments)
    several = next((name for name in ("overrides", "arguments", "inputs", "paths") if hasattr(args, name)), None)
    if rest and (several is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if several is not None:
        setattr(args, several, [*getattr(args, several), *rest])
    return args


def _build_parser() -> argparse.ArgumentParser:
    from aria_train import launch
    from aria_train.data import commands as data_commands
    from aria_train.eval import commands as eval_commands
    from aria_train.parallel import checkpoint_commands
    from aria_train.plan import commands as plan_commands

    parser = argparse.ArgumentParser(
        prog="aria-train",
        description="Pre-trains Aria, a multimodal mixture-of-experts model, stage by stage.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    train = subparsers.add_parser(
        "train",
        help="train one stage; goes on from its run directory by itself",
        description="Trains one stage. Run it alone for one process, or under torchrun for many. Started again, it "
        "goes on from the newest complete checkpoint of train.run_dir.",
    )
    train.add_argument("config", metavar="CONFIG", help="the stage's YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file's")
    train.add_argument(
        "--replay-step",
        type=int,
        metavar="N",
        help="take step N of an earlier run again, looking at each window of its batch; changes nothing",
    )
    train.set_defaults(run=_train, resumes=True)
    _register_curriculum(subparsers)
    data_commands.register(subparsers)
    _register_weights(subparsers)
    eval_commands.register(subparsers)
    checkpoint_commands.register(subparsers)
    plan_commands.register(subparsers)
    launch.register(subparsers)
    return parser


def _register_curriculum(subparsers: Any) -> None:
    curriculum = subparsers.add_parser(
        "curriculum",
        help="train stages in order, each from the weights of the one before",
        description="Trains stages in order, each from the final weights of the one before it. All are checked before "
        "the first starts. Run it alone or under torchrun; started again, it goes on where it stopped.",
    )
    curriculum.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG | section.key=value",
        help="the stages' YAML files in order, and values that win over those of every file; train.run_dir=ROOT puts "
        "the stages into ROOT, one folder each, named as its YAML",
    )
    curriculum.add_argument("--dry-run", action="store_true", help="show the plan and what is missing; train nothing")
    curriculum.set_defaults(run=command("aria_train.stages.curriculum", "run_curriculum"), resumes=True)


def _register_weights(subparsers: Any) -> None:
    load = subparsers.add_parser("import", help="make a checkpoint of Hugging Face weights")
    load.add_argument(
        "hf_dir", metavar="HF_DIR", help="folder with config.json and safetensors, in any published naming"
    )
    load.add_argument(
        "checkpoint", type=local_path, metavar="CHECKPOINT", help="new checkpoint folder, for checkpoint.init_from"
    )
    load.set_defaults(run=command("aria_train.stages.weights", "run_import"))
    store = subparsers.add_parser("export", help="make Hugging Face weights of a checkpoint")
    store.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    store.add_argument("hf_dir", type=local_path, metavar="HF_DIR", help="new folder, which transformers loads")
    store.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    store.set_defaults(run=command("aria_train.stages.weights", "run_export"))


def _train(args: argparse.Namespace) -> None:
    from aria_train.config import load_config

    config = load_config(args.config, args.overrides)
    if os.environ.get("RANK", "0") == "0":
        for doubt in config.doubts():
            print(f"note: {doubt}", flush=True)
    from aria_train.train.session import run_stage

    run_stage(config, args.replay_step)


def _print_error(error: UserError) -> None:
    """One paragraph per cause: of the ranks that meet the same error, one speaks."""
    rank = os.environ.get("RANK")
    if rank is None:
        print(f"aria-train: error: {error}", file=sys.stderr, flush=True)
    elif error.spokesman if error.spokesman is not None else rank == "0":
        print(f"aria-train: error (rank {rank}): {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # The launcher ends all ranks when the first exits: let the one that speaks finish.
