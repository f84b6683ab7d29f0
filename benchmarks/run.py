"""`make bench`: every row, or those named; shows them, and writes JSON and this machine's table of the
documentation.

python -m benchmarks.run [SUITE ...] [--turns 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks import data, moe_layer, pieces, ranks, startup, storage, table, training_step, vision
from benchmarks.measure import gemm_ceilings
from benchmarks.table import Row

Suite = Callable[[int, dict[str, float]], list[Row]]
SUITES: dict[str, Suite] = {
    "vision": lambda turns, ceilings: vision.rows(turns, ceilings["fp32"]),
    "text": lambda turns, ceilings: training_step.rows(turns, ceilings, training_step.TEXT),
    "multimodal": lambda turns, ceilings: training_step.rows(turns, ceilings, training_step.MULTIMODAL),
    "moe": moe_layer.rows,
    "pieces": pieces.rows,
    "data": lambda turns, ceilings: data.rows(turns),
    "storage": lambda turns, ceilings: storage.rows(turns),
    "startup": lambda turns, ceilings: startup.rows(turns),
    "ranks": lambda turns, ceilings: ranks.rows(turns),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--turns", type=int, default=7, help="measurements of each side (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each side")
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}: there are {', '.join(SUITES)}")
    if arguments.turns < 2:
        parser.error("--turns must be at least 2, for a median and its spread")
    torch.set_num_threads(arguments.threads)

    ceilings = gemm_ceilings()
    facts = table.machine() | {f"gemm_{name}_gflops": round(value / 1e9) for name, value in ceilings.items()}
    print(table.in_words(facts), flush=True)
    rows: list[Row] = []
    for name in arguments.suites or SUITES:
        began = time.perf_counter()
        print(f"{name} ...", flush=True)
        rows += SUITES[name](arguments.turns, ceilings)
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    table.show(rows)
    if not arguments.suites:
        table.write(rows, facts, "make bench")


if __name__ == "__main__":
    main()
