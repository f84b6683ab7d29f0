"""`train.compile`: the same numbers, whatever else is chosen, and one clear error where nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from aria_train.config import dump_config
from aria_train.kernels.compiled import chain, compile_chains
from aria_train.model import AriaModel
from aria_train.moe.experts import GroupedExperts
from tests.model.test_decoder import DOCUMENTS, model_config, pack
from tests.tiny import tiny_config, unequal_corpora


@pytest.fixture
def switched_off() -> Iterator[None]:
    yield
    compile_chains(False)


def step(model: AriaModel) -> list[Tensor]:
    """Loss, statistics and gradients of one batch."""
    model.zero_grad()
    output = model(pack(DOCUMENTS))
    (output.loss_sum + output.router.z_sum.sum() + output.router.prob_sums.square().sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [output.loss_sum.detach(), output.token_losses, output.router.counts, output.router.entropy_sum, *gradients]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.usefixtures("switched_off")
def test_compiled_chains_change_no_number(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatched, as on a GPU: that has every chain in it."""
    if " " in torch.__file__:  # the C++ compiler would take the path for two; all before it is the same
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(GroupedExperts, "mixes", False)
    model = AriaModel(model_config()).to(dtype)
    counters.clear()
    wanted = step(model)
    compile_chains(True)
    for a, b in zip(step(model), wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= tolerance * b.float().norm()
    assert counters["stats"]["unique_graphs"] >= 6
    assert not counters["graph_break"]


def _add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@pytest.mark.usefixtures("switched_off")
def test_widths_are_constants_of_a_compiled_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one function serves several: rows of a symbol's length could not be loaded several numbers at once."""
    seen: list[tuple[int | torch.SymInt, ...]] = []

    def look(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        seen.extend((*x.shape, *x.stride()) for x in inputs if isinstance(x, Tensor) and x.ndim == 2)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=look))
    add = chain(_add)
    compile_chains(True)
    for rows, width in [(64, 48), (96, 16), (128, 16), (160, 48), (200, 16), (72, 48)]:
        ones = torch.ones(rows, width)
        assert torch.equal(add(ones, ones.clone()), 2 * ones)
    assert {type(size) for _, *sizes in seen for size in sizes} == {int}
    assert {rows for rows, *_ in seen if isinstance(rows, int)} == {64, 96}  # from the second number on a symbol


def test_without_a_compiler_one_error_before_anything_starts(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"))
    file = tmp_path / "stage.yaml"
    file.write_text(dump_config(config))
    nothing = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "aria_train", "train", str(file), "train.compile=true"]
    done = subprocess.run(command, env=os.environ | nothing, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "train.compile is true, but torch.compile" in done.stderr
    assert "no-compiler" in done.stderr
    assert "train.compile=false" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
