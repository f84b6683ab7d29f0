"""What `aria-train plan` says of small layouts, against what runs of them hold and send."""

from __future__ import annotations

import json
import statistics
import threading
import time
import weakref
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from aria_train.cli import main
from aria_train.config import RunConfig, dump_config
from aria_train.parallel.shard import fsdp_modules
from aria_train.plan.communication import communication
from aria_train.plan.layout import Layout, parameters_of
from aria_train.plan.memory import Memory, memory
from aria_train.plan.trace import trace
from tests.distributed import run_distributed
from tests.parallel.test_communication import Collectives
from tests.tiny import random_documents, tiny_config, with_values, write_corpus

LENGTH = 128
MODEL = {
    "vocab_size": 512, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "num_experts": 8, "top_k": 2, "expert_size": 96, "num_shared_experts": 1, "init_std": 0.02,
}  # fmt: skip

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallel, train
    "one rank": (1, {}, {"micro_batch_size": 4}),
    "one rank, bf16": (1, {}, {"micro_batch_size": 4, "precision": "bf16"}),
    "one rank, full recompute": (1, {}, {"micro_batch_size": 4, "recompute": "full"}),
    # Nothing divides by 3.
    "ZeRO 3, selective recompute": (
        3,
        {},
        {"micro_batch_size": 2, "recompute": "selective", "global_batch_size": 12},
    ),
    "EP 2, bf16, full recompute": (
        2,
        {"expert_parallel_size": 2},
        {"micro_batch_size": 2, "precision": "bf16", "recompute": "full"},
    ),
    "EP 2 x ZeRO 2, selective recompute": (
        4,
        {"expert_parallel_size": 2},
        {"micro_batch_size": 1, "recompute": "selective"},
    ),
    "2 replicas of EP 2": (4, {"expert_parallel_size": 2, "zero_group_size": 2}, {"micro_batch_size": 1}),
}


def config_of(folder: Path, name: str) -> RunConfig:
    """Eight windows per step (or twelve), each one document that fills it."""
    corpus = folder / "corpus"
    if not corpus.with_suffix(".idx").exists():
        write_corpus(corpus, random_documents(64, LENGTH + 1, LENGTH + 1, seed=1))
    _, parallel, train = LAYOUTS[name]
    config = tiny_config(folder / name, [{"name": "full", "path": str(corpus)}], model=MODEL, parallel=parallel)
    return with_values(config, train={"context_length": LENGTH, "global_batch_size": 8, **train})


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(config: RunConfig) -> dict[str, Any]:
    """What this rank holds in the second step, by the allocator's own account, and what it sends.

    With the operations of a GPU, which the plan is for: those made for CPUs keep less.
    """
    with mock.patch("aria_train.kernels.on_cpu", _never):
        return _measure(config)


def _never(_: Tensor) -> bool:
    """Unlike a mock, keeps no hold of the tensors it is asked about."""
    return False


def _measure(config: RunConfig) -> dict[str, Any]:
    from aria_train.train import trainer as module

    trainer = module.Trainer(config)
    trainer._step(next(trainer.loader))
    batches = next(trainer.loader)
    model = trainer.state.model
    held: dict[str, int] = {}
    hidden_states, objective = model.hidden_states, module.objective

    def at_the_head(*args: Any) -> Any:
        with record_function("forward begins"):
            pass
        outcome = hidden_states(*args)
        with record_function("head begins"):
            pass
        return outcome

    def at_the_end(*args: Any) -> Any:
        # Of the last micro-batch's: all weights are gathered, all gradients but its own summed up.
        held["computing_weights"], held["gradients"] = whole_weights_and_gradients(model)
        return objective(*args)

    with (
        Traffic() as sent,
        mock.patch.object(model, "hidden_states", at_the_head),
        mock.patch.object(module, "objective", at_the_end),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        trainer._step(batches)
    trainer.close()
    state = trainer.state.optimizer.state.values()
    held["master_weights"] = sum(map(local_bytes, model.parameters()))
    held["optimizer"] = sum(local_bytes(s[key]) for s in state for key in ("exp_avg", "exp_avg_sq"))
    return {
        "held": held | activations(profiled, sent.freed_elsewhere),
        "calls": dict(sent.calls),
        "bytes": dict(sent.bytes),
    }


class Traffic(Collectives):
    """Also notes which tensors of a collective another thread is the last to let go of.

    Gloo's threads hold what they send and receive until a moment after the wait for it is over. Where this thread is
    done with a tensor by then, it is freed over there, and the profiler, which follows this thread alone, never hears.
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed_elsewhere: list[tuple[int, int]] = []
        """Time (ns) and bytes, less than 0 as the profiler has it."""
        self._here, self._watched = threading.get_ident(), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            for tensor in tree_leaves((args, kwargs, out)):
                if isinstance(tensor, Tensor):
                    self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._watched:
            self._watched.add(key)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._watched.discard(key)
        if threading.get_ident() != self._here:
            self.freed_elsewhere.append((time.time_ns(), -size))


def local_bytes(tensor: Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


def whole_weights_and_gradients(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes that are neither shards nor activations, as FSDP holds them at this moment."""
    weights = gradients = 0
    managed: set[Any] = set()
    for module in fsdp_modules(model):
        group = cast(Any, module)._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else ():
            shard, whole = parameter._sharded_local_tensor, parameter._unsharded_param
            whole = whole.to_local() if isinstance(whole, DTensor) else whole
            if whole.untyped_storage().data_ptr() != shard.untyped_storage().data_ptr():
                weights += whole.untyped_storage().nbytes()
            summed = parameter.unsharded_accumulated_grad
            summed = parameter._unsharded_param.grad if summed is None else summed
            gradients += 0 if summed is None else local_bytes(summed)
            managed |= {parameter.sharded_param, parameter._unsharded_param}
    plain = (p.grad for p in model.parameters() if p not in managed)
    gradients += sum(local_bytes(gradient) for gradient in plain if gradient is not None)
    return weights, gradients


def activations(profiled: Any, freed_elsewhere: list[tuple[int, int]]) -> dict[str, int]:
    """Of the last micro-batch: bytes kept when the head begins, and the most at once; both since its beginning."""
    events = [(event.start_ns(), event.name(), event.nbytes()) for event in profiled.profiler.kineto_results.events()]
    events += [(when, "[memory]", size) for when, size in freed_elsewhere]
    level = begin = kept = peak = 0
    for _, name, size in sorted(events, key=lambda event: event[0]):
        if name == "[memory]":
            level += size
            peak = max(peak, level)
        elif name == "forward begins":
            begin = peak = level
        elif name == "head begins":
            kept = level - begin
    return {"weights and gradients": begin, "activations": kept, "at most": peak - begin}


def measure_all(configs: list[RunConfig]) -> list[dict[str, Any]]:
    return [measure(config) for config in configs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Layout -> what each rank measured."""
    results = {}
    for ranks in (1, 2, 3, 4):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == ranks]
        per_rank = run_distributed(measure_all, ranks, [config_of(folder, name) for name in names])
        results.update({name: [rank[index] for rank in per_rank] for index, name in enumerate(names)})
    return results


def planned(config: RunConfig, ranks: int) -> Memory:
    parameters, layout = parameters_of(config.model), Layout.of(config, ranks)
    return memory(config, parameters, layout, trace(config, layout.expert))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_as_planned(name: str, folder: Path, measured: dict[str, list[dict[str, Any]]]) -> None:
    plan = planned(config_of(folder, name), LAYOUTS[name][0])
    held = {key: max(rank["held"][key] for rank in measured[name]) for key in measured[name][0]["held"]}
    # Which experts are busy is for the data to say; over the ranks it evens out.
    for key in ("activations", "at most"):
        held[key] = statistics.mean(rank["held"][key] for rank in measured[name])
    for part in ("master_weights", "optimizer", "computing_weights"):
        assert plan.parts()[part] == pytest.approx(held[part], rel=0.05), part
    if held["gradients"]:  # with one micro-batch there are none yet
        assert plan.gradients == pytest.approx(held["gradients"], rel=0.05)
        # The same by the allocator's account: what came since the step began.
        assert plan.computing_weights + plan.gradients == pytest.approx(held["weights and gradients"], rel=0.05)
    assert plan.activations == pytest.approx(held["activations"], rel=0.15)
    # Whether buffers of two collectives exist at once is for the threads that run them to say: a peak may stay lower.
    peak = plan.peak - (plan.computing_weights + plan.gradients + plan.state)
    assert held["at most"] / 1.15 <= peak <= held["at most"] * 1.3


KINDS = {
    "_allgather_base_": ("all-gather", ""),
    "_reduce_scatter_base_": ("reduce-scatter", ""),
    "allreduce_": ("all-reduce", ""),
    "tokens": ("all-to-all", "tokens"),
    "token counts": ("all-to-all", "token counts"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_calls_and_bytes_are_exactly_those_planned(
    name: str, folder: Path, measured: dict[str, list[dict[str, Any]]]
) -> None:
    config = config_of(folder, name)
    plan = communication(config, parameters_of(config.model), Layout.of(config, LAYOUTS[name][0]))
    for key, (kind, what) in KINDS.items():
        expected = [c for c in plan if c.kind == kind and what in ("", c.what)]
        calls = sum(c.calls for c in expected)
        if LAYOUTS[name][0] == 1:
            # A group of one has collectives too; nothing moves.
            assert calls == 0
            continue
        for rank in measured[name]:
            assert rank["calls"].get(key, 0) == calls, key
        given = [rank["bytes"].get(key, 0) for rank in measured[name]]
        # A rank sends back as many tokens as it was sent: the data says how many, the sum over ranks is known.
        largest = sum(given) / len(given) if what == "tokens" else max(given)
        assert largest == sum(c.given for c in expected), key
    waiting = {"wait_tensor", "_wrap_tensor_autograd"}
    assert measured[name][0]["calls"].keys() <= KINDS.keys() | waiting


# ---------------------------------------------------------------------------------------------------------------------
# The command


def stage_file(folder: Path, **train: Any) -> str:
    config = tiny_config(folder / "run", [{"name": "a", "path": "nowhere"}], model=MODEL, train=train)
    path = folder / "stage.yaml"
    path.write_text(dump_config(config))
    return str(path)


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return cast("dict[str, Any]", json.loads(capsys.readouterr().out))


def test_the_plan_of_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage_file(tmp_path, global_batch_size=4096, max_steps=1000)
    said = plan_of(capsys, path, "--gpus", "1024", "--gpu", "h200", "--utilisation", "0.5")
    assert said["fits"]
    assert said["parameters"]["total"] == 895_616
    experts = 8 * 2 * (128 * 192 + 96 * 128)
    decoder = 895_616 - 2 * 512 * 128
    assert said["parameters"]["activated_body"] == decoder - experts + experts * 2 // 8
    speed = said["speed"]
    assert speed["tokens_per_second"] == pytest.approx(1024 * 989e12 * 0.5 / speed["flops_per_token"])
    assert speed["days"] == pytest.approx(1000 * 4096 * 32 / speed["tokens_per_second"] / 86400)
    assert said["host_bytes"] == said["memory_bytes"]["master_weights"] + said["memory_bytes"]["optimizer"]
    assert plan_of(capsys, path, "checkpoint.asynchronous=false", "--gpus", "1024")["host_bytes"] == 0
    assert main(["plan", path, "--gpus", "1024"]) == 0
    text = capsys.readouterr().out
    assert "fits" in text
    assert "on a node of 8" in text


def test_what_is_suggested_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU that the layout as it is would not fit."""
    path = stage_file(tmp_path, global_batch_size=4096, context_length=8192, micro_batch_size=8)
    path_and_gpu = (path, "--gpus", "16", "--memory", "2.4", "--peak", "900")
    said = plan_of(capsys, *path_and_gpu)
    assert not said["fits"]
    assert said["suggestions"]
    for suggestion in said["suggestions"]:
        again = plan_of(capsys, *path_and_gpu, *suggestion["overrides"])
        assert again["fits"]
        assert again["memory_bytes"]["on_gpu"] == pytest.approx(suggestion["on_gpu"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "3"], "train.global_batch_size"),
        (["--gpu", "abacus"], "known are"),
        (["--utilisation", "40"], "a share above 0"),
        (["--gpus", "-1"], "--gpus -1: must be above 0"),
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--gpu", "abacus", "--memory", "0", "--peak", "1"], "--memory 0.0: must be above 0"),
        (["--peak", "nan"], "--peak nan: must be above 0"),
        (["--images", "2"], "no vision encoder"),
    ],
)
def test_plans_that_cannot_be(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", stage_file(tmp_path, global_batch_size=16), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("images", ["-1", "1000"])
def test_more_images_than_a_micro_batch_holds(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Path(__file__).resolve().parents[2] / "configs" / "small" / "stage2_mm.yaml"
    assert main(["plan", str(stage), "--images", images]) == 2
    assert f"--images {images}: 0 to 64" in capsys.readouterr().err
