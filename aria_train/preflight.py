"""Whether a node is fit for a run, before the ranks start: `python -m aria_train.preflight --ranks N train CONFIG ...`.

The SLURM script runs it once on every node. It prints one line, and exits with status 2 and a reason if the node lacks
something: the packages, GPUs, a configuration that loads, a run directory it can write to.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aria_train.errors import EXIT_USER_ERROR, ConfigError, UserError
from aria_train.machine import num_cpus


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aria_train.preflight", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, required=True, help="ranks that will run on this node")
    parser.add_argument("command", choices=("train", "curriculum"), help="of aria-train")
    parser.add_argument("arguments", nargs="+", help="and its arguments")
    args = parser.parse_args(arguments)
    try:
        print(check_node(args.ranks, args.command, args.arguments), flush=True)
    except UserError as error:
        print(f"{socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


def check_node(ranks: int, command: str, arguments: Sequence[str]) -> str:
    """A line about this node. Raises ConfigError if `ranks` ranks of this run cannot work on it."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"{sys.executable} has no PyTorch ({error}): set launch.python or launch.setup.") from None
    from aria_train.stages.stage import load_run

    config = load_run(command, arguments)[0].config
    gpus = torch.cuda.device_count()
    if config.train.device == "cuda" or (config.train.device == "auto" and gpus):
        if gpus < ranks:
            raise ConfigError(
                f"{gpus} GPU(s) to be seen for {ranks} ranks; ask for more, or set launch.ranks_per_node."
            )
        hardware = f"{gpus} x {torch.cuda.get_device_name(0)}"
    else:
        hardware = f"no GPUs in use, {num_cpus()} cores"
    run_dir = Path(config.train.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise ConfigError(f"train.run_dir {run_dir} cannot be written to from here: {error}.") from None
    free = shutil.disk_usage(run_dir).free / 1e9
    return (
        f"{socket.gethostname()}: Python {platform.python_version()}, torch {torch.__version__}, {hardware}, "
        f"{free:,.0f} GB free for {run_dir}"
    )


if __name__ == "__main__":
    sys.exit(main())
