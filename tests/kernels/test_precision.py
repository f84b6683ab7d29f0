"""A CPU without instructions for bf16 is told from one with them, and a run says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from aria_train.kernels import precision
from aria_train.train.trainer import Trainer
from tests.tiny import tiny_config, unequal_corpora


@pytest.mark.parametrize(("cost", "says"), [(25.3, True), (0.4, False)])
@pytest.mark.parametrize("chosen", ["bf16", "fp32"])
def test_a_run_says_that_bf16_is_slower_here(
    cost: float, says: bool, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(precision, "bf16_cost", lambda: cost)
    config = tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"), train={"precision": chosen})
    Trainer(config)
    expected = "products take 25 times as long as in float32"
    assert (expected in capsys.readouterr().out) == (says and chosen == "bf16")


def test_the_cost_is_measured() -> None:
    assert 0.01 < precision.bf16_cost() < 10_000
