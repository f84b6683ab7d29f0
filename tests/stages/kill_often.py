"""`python -m tests.stages.kill_often [KILLS] [SEED]`: four stages on two ranks, killed at random moments and started
again, against the same stages left alone. The test suite does this with fewer kills."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.stages.recipe import write_stages
from tests.stages.test_interruption import assert_complete, assert_same, kill_and_go_on, run


def main(kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_stages(folder / "stages")
        seconds = assert_complete(run(paths, folder / "alone"))
        struck = kill_and_go_on(paths, folder / "killed", seconds, kills, seed)
        assert_same(folder / "killed", folder / "alone")
    print(f"{struck} of {kills} kills struck; weights, moments, metrics and timeline are equal to the bit")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*[*arguments, *(10, 0)[len(arguments) :]])
