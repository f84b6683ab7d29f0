"""The page of `make faults` says what its results say, of every fault; the faults themselves take long to run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults import run


def test_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed, page = run.PAGE.read_text(), tmp_path / "page.md"
    page.write_text(committed)
    monkeypatch.setattr(run, "PAGE", page)
    names = [scenario.__name__ for scenario in run.SCENARIOS]
    run.write_page(names)
    assert page.read_text() == committed
    assert set(json.loads(run.RESULTS.read_text())) <= {*names, run.STALL}
