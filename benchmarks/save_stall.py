"""How long training stands still for a checkpoint: an asynchronous save beside a synchronous one, in turns.

    python -m benchmarks.save_stall [--mebibytes 512] [--rounds 5] [--json FILE]

A step here is a matrix product on one thread, as a GPU would leave the host's other cores idle. Each round times the
same number of steps without a save, with a synchronous one before them, and with an asynchronous one, long enough for
its files to be published meanwhile. `blocked` is what the call itself takes, `lost` what the steps took longer in all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Manifest, Saver

_TENSORS = 64


def measure(mebibytes: int, rounds: int, folder: Path) -> dict[str, float | str]:
    """Medians over the rounds, in seconds, and the ratios of asynchronous to synchronous."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    size = mebibytes * 2**18 // _TENSORS
    tensors = {f"model.{number}": torch.full((size,), float(number)) for number in range(_TENSORS)}
    savers = {"synchronous": Saver(False, print), "asynchronous": Saver(True, print)}
    step = _step()
    try:
        saves = {name: _save(saver, tensors, folder / name) for name, saver in savers.items()}
        for save in saves.values():  # memory for the copy is taken once in a run
            save()
        savers["asynchronous"].finish()
        steps = _steps_to_cover(saves["synchronous"], step)
        blocked: dict[str, list[float]] = {name: [] for name in saves}
        lost: dict[str, list[float]] = {name: [] for name in saves}
        for _ in range(rounds):
            alone = _seconds(lambda: _repeat(step, steps))
            for name, save in saves.items():
                began = time.perf_counter()
                blocked[name].append(_seconds(save))
                _repeat(step, steps)
                lost[name].append(time.perf_counter() - began - alone)
                savers[name].finish()
    finally:
        for saver in savers.values():
            saver.close()
        dist.destroy_process_group()
    median = {
        f"{what}_{name}": statistics.median(times)
        for what, by_name in (("blocked", blocked), ("lost", lost))
        for name, times in by_name.items()
    }
    ratios = {
        f"{what}_ratio": median[f"{what}_asynchronous"] / median[f"{what}_synchronous"] for what in ("blocked", "lost")
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return {"mebibytes": mebibytes, "rounds": rounds, **median, **ratios, "machine": machine}


def _step() -> Callable[[], object]:
    factor = torch.ones(768, 768)
    return lambda: factor @ factor


def _repeat(step: Callable[[], object], times: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(times):
        step()
    torch.set_num_threads(threads)


def _steps_to_cover(save: Callable[[], None], step: Callable[[], object]) -> int:
    """Steps that take one and a half times as long as a synchronous save."""
    return max(1, round(1.5 * _seconds(save) / (_seconds(lambda: _repeat(step, 20)) / 20)))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _save(saver: Saver, tensors: dict[str, Tensor], home: Path) -> Callable[[], None]:
    """Saves over the checkpoint before."""

    def save() -> None:
        manifest = Manifest(step=1, tokens=1, config={}, layout={}, sources={}, files={})
        saver.save(checkpoint.folder_of_step(home, 1), tensors, manifest, after=lambda: None)

    return save


def main(arguments: Sequence[str] | None = None) -> dict[str, float | str]:
    """Prints the result; writes it as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="benchmarks.save_stall", description=__doc__.partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=512, help="of weights and moments (512)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        result = measure(args.mebibytes, args.rounds, Path(folder))
    for key, value in result.items():
        print(f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
