"""`aria-train checkpoint verify|list|prune`."""

from __future__ import annotations

import argparse
from typing import Any

from aria_train.errors import CheckpointError

_WHERE = "run directory, or what checkpoint.storage names"


def register(subparsers: Any) -> None:
    """Adds the command to the command line; imports nothing heavy."""
    command = subparsers.add_parser("checkpoint", help="verify, list or prune checkpoints")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="compare every byte with its checksum")
    verify.add_argument("paths", nargs="+", metavar="PATH", help=f"checkpoint folder; or {_WHERE}: all in it")
    verify.set_defaults(run=run_verify)
    show = actions.add_parser("list", help="what there is: step, tokens, size, state")
    show.add_argument("home", metavar="RUN_DIR", help=_WHERE)
    show.set_defaults(run=run_list)
    prune = actions.add_parser("prune", help="remove all but the newest complete checkpoints")
    prune.add_argument("home", metavar="RUN_DIR", help=_WHERE)
    prune.add_argument("--keep-last", type=_positive, required=True, metavar="N", help="newest ones to keep")
    prune.add_argument("--keep-every", type=_positive, default=0, metavar="M", help="keep steps that are multiples too")
    prune.add_argument("--unfinished", action="store_true", help="also what is half written; only while no run writes")
    prune.set_defaults(run=run_prune)


def run_verify(args: argparse.Namespace) -> None:
    """Prints a line per checkpoint; raises CheckpointError if one is damaged or there is none."""
    from aria_train.parallel import checkpoint

    damaged = 0
    for path in args.paths:
        home = checkpoint.locate(path)
        if "checkpoints" in (checkpoint.listing(home) or {}):
            folders = [entry.folder for entry in checkpoint.entries(home) if not entry.is_unfinished]
        else:
            folders = [home]
        if not folders:
            raise CheckpointError(f"{path} holds no checkpoint.")
        for folder in folders:
            try:
                manifest = checkpoint.read_manifest(folder)
                checkpoint.verify(folder, manifest)
            except CheckpointError as error:
                damaged += 1
                print(error, flush=True)
            else:
                print(f"{folder}: intact, {_readable(manifest.num_bytes)}", flush=True)
    if damaged:
        raise CheckpointError(f"{damaged} damaged checkpoint(s). A run goes on from the newest intact one by itself.")


def run_list(args: argparse.Namespace) -> None:
    """Prints a table, oldest first."""
    from aria_train.parallel import checkpoint

    found = checkpoint.entries(checkpoint.locate(args.home))
    if not found:
        raise CheckpointError(f"{args.home} holds no checkpoints/. Give a {_WHERE}.")
    print(f"{'checkpoint':<28} {'tokens':>18} {'size':>10} {'ranks':>6}  state")
    for entry in found:
        if entry.manifest is None:
            print(f"{entry.folder.name:<28} {'':>18} {'':>10} {'':>6}  {entry.problem}")
            continue
        manifest = entry.manifest
        state = "complete" if manifest.is_good else "complete, amid skipped steps"
        ranks = manifest.layout.get("world_size", "")
        print(f"{entry.folder.name:<28} {manifest.tokens:>18,} {_readable(manifest.num_bytes):>10} {ranks:>6}  {state}")


def run_prune(args: argparse.Namespace) -> None:
    """Prints what was removed."""
    from aria_train.parallel import checkpoint

    home = checkpoint.locate(args.home)
    if "checkpoints" not in (checkpoint.listing(home) or {}):
        raise CheckpointError(f"{args.home} holds no checkpoints/. Give a {_WHERE}.")
    gone = checkpoint.prune(home, args.keep_last, args.keep_every, args.unfinished)
    for folder in gone:
        print(f"removed {folder}")
    left = [entry for entry in checkpoint.entries(home) if entry.manifest is None]
    for entry in left:
        print(f"left alone {entry.folder}: {entry.problem}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _readable(size: int) -> str:
    """1234567 -> 1.2 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
