"""`make bench-gpu`: training steps at Aria's full width on one GPU, beside transformers' Aria with grouped GEMMs.

    python -m benchmarks.gpu [--turns 5]        python -m benchmarks.gpu --tiny     the same code on any machine

Three parts: both sides in turns, with as many layers as hold both; ours alone, with as many layers as fit, windows of
8K; ours alone, one window of 64K. The first two as written, with train.compile, and with experts in FP8 too. Hidden
size 2560, 64 experts of 1664, six of them per token, vocabulary 100,352, bf16 with float32 master weights, natural
routing. A step of 8K windows has eight of them, in micro-batches: one GPU updates all weights by itself, where in a
training run hundreds share that, and with a single window the update would take half the step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig, OptimizerConfig, ParallelConfig
from aria_train.data.work import forward_flops
from aria_train.errors import ConfigError
from aria_train.kernels import fp8
from aria_train.kernels.compiled import compile_chains
from aria_train.model import AriaModel
from aria_train.model.hf.config import hf_config
from aria_train.model.init import initialise
from aria_train.model.recompute import Recompute
from aria_train.moe.experts import use_fp8
from aria_train.parallel.mesh import build_meshes, init_process_group, pick_device
from aria_train.parallel.shard import parallelize, set_last_micro_batch
from aria_train.train.objective import Totals, objective
from aria_train.train.optimizer import build_optimizer, clip_gradients
from benchmarks.measure import Run, compare, gemm_ceiling, seconds_of
from benchmarks.table import Row, in_words, machine, show, write

MOST_LAYERS = 28

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Size:
    layers: int
    tokens: int = 8192
    windows: int = 8
    micro_batch: int = 1
    """Of these windows."""
    recompute: Recompute = "selective"
    compile: bool = False
    fp8: bool = False
    tiny: bool = False

    def model(self) -> ModelConfig:
        if not self.tiny:
            return ModelConfig(num_layers=self.layers, max_positions=65536, vision=None)
        return ModelConfig(
            vocab_size=512, hidden_size=64, num_layers=self.layers, num_heads=1, num_kv_heads=1, head_dim=64,
            num_experts=8, top_k=2, expert_size=32, num_shared_experts=1, vision=None, max_positions=65536,
        )  # fmt: skip

    def __str__(self) -> str:
        windows = f"{self.windows} x " if self.windows > 1 else ""
        windows += f"({self.micro_batch} at once) " if self.micro_batch > 1 else ""
        more = ", compiled" * self.compile + ", experts in FP8" * self.fp8
        return f"{self.layers} layers, {windows}{self.tokens:,} tokens, recompute {self.recompute}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark itself")
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error("--turns must be at least 2, for a median and its spread")
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.exit(2, "make bench-gpu: no GPU here. --tiny tries the benchmark with a toy model on the CPU.\n")
    tiny, turns = arguments.tiny, arguments.turns
    device = pick_device("auto")
    init_process_group(device)
    ceiling = gemm_ceiling(torch.bfloat16, 512 if tiny else 8192, device=device)
    facts = machine(device) | {"gemm_bf16_tflops": round(ceiling / 1e12, 1)}
    print(in_words(facts), flush=True)

    both = Size(1 if tiny else 4, 64 if tiny else 8192, tiny=tiny)
    chosen = ways(device)
    most = replace(both, layers=2 if tiny else MOST_LAYERS, micro_batch=2)
    long = {"tokens": 256 if tiny else 65536, "windows": 1, "micro_batch": 1, "recompute": "full"}
    rows: list[Row] = []
    by_itself: list[dict[str, Any]] = []

    def keep() -> None:
        """What there is so far: the rest may meet an error."""
        if not tiny:
            write(rows, facts, "make bench-gpu", ours_alone=by_itself)

    for way in chosen:
        row, both = fitting(replace(both, **way), lambda size: side_by_side(size, device, turns, ceiling))
        rows.append(row)
        show([row])
        keep()
    for way in [*chosen, long | {"compile": False, "fp8": False}]:
        figures, most = fitting(replace(most, **way), lambda size: alone(size, device, turns, ceiling))
        by_itself.append(figures)
        print(in_words(figures), flush=True)
        keep()
    dist.destroy_process_group()


def ways(device: torch.device) -> list[dict[str, Any]]:
    """As written, compiled, and compiled with experts in FP8 where the device has it."""
    found: list[dict[str, Any]] = [{}, {"compile": True}, {"compile": True, "fp8": True}]
    try:
        fp8.require(device)
    except ConfigError as error:
        print(f"FP8 is left out: {error}", flush=True)
        found.pop()
    return found


def fitting(size: Size, measure: Callable[[Size], Measured]) -> tuple[Measured, Size]:
    """What is measured with the most layers that fit, up to those of `size`; and the size with as many."""
    while True:
        clean()
        try:
            return measure(size), size
        except RuntimeError as error:  # libraries that find no memory for themselves do not raise OutOfMemoryError
            if "out of memory" not in str(error).lower() and "alloc" not in str(error).lower():
                raise
            if size.layers == 1:
                sys.exit(f"make bench-gpu: not even one layer fits this GPU ({size}): {error}")
            size = replace(size, layers=size.layers - 1 if size.layers <= 8 else size.layers // 2)


def side_by_side(size: Size, device: torch.device, turns: int, ceiling: float) -> Row:
    comparison = compare(build_ours(size, device), build_theirs(size, device), turns, warmup=2)
    share = flops(size) / comparison.seconds[0] / ceiling
    peer = f"transformers' Aria, {'grouped_mm' if groups_experts() else 'one expert after the other'}"
    return Row("training step, full width", peer, comparison, f"bf16, {size}", share)


def alone(size: Size, device: torch.device, turns: int, ceiling: float) -> dict[str, Any]:
    run = build_ours(size, device)
    for _ in range(2):
        run()
    seconds, tokens = statistics.median(seconds_of(run) for _ in range(turns)), size.tokens * size.windows
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None
    return {
        "size": str(size),
        "tokens_per_second": round(tokens / seconds),
        "tflops_by_activated_parameters": round(flops(size) / seconds / 1e12, 1),
        "share_of_gemm_ceiling": round(flops(size) / seconds / ceiling, 3),
        "peak_gib": peak,
    }


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def flops(size: Size) -> float:
    """Forward and backward, by what a token activates; recomputation is not counted."""
    return 3 * size.windows * forward_flops([size.tokens], [], size.model())


def build_ours(size: Size, device: torch.device) -> Run:
    """The trainer's own parts, on one rank."""
    config = size.model()
    meshes = build_meshes(ParallelConfig(), device)
    with torch.device("meta"):
        model = AriaModel(config)
    model.set_recompute(size.recompute)
    compile_chains(size.compile, device)
    if size.fp8:
        use_fp8(model, device)
    parallelize(model, meshes, "bf16")
    model.to_empty(device=device)
    initialise(model, config.init_std, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = [batch.to(device) for batch in batches_of(size)]
    totals = Totals(targets=size.tokens * size.windows, tokens=size.tokens * size.windows)
    counts = torch.ones(config.num_layers, config.num_experts, dtype=torch.float64, device=device)

    def run() -> None:
        for batch in batches:
            set_last_micro_batch(model, batch is batches[-1])
            objective(model(batch), totals, counts, config).backward()
        clip_gradients(parameters, 1.0, meshes.num_replicas)
        optimizer.step()
        optimizer.zero_grad()

    return run


def batches_of(size: Size) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    tokens = size.tokens * size.micro_batch
    rows = torch.randint(10, size.model().vocab_size, (size.windows // size.micro_batch, tokens), generator=generator)
    starts = torch.arange(0, tokens + 1, size.tokens, dtype=torch.int32)
    sources = torch.zeros(size.micro_batch, dtype=torch.int64)
    return [MicroBatch(ids, ids.roll(-1), starts, size.tokens, sources) for ids in rows]


def build_theirs(size: Size, device: torch.device) -> Run:
    """bf16 throughout, moments too, which takes less memory than ours; their checkpointing stays off."""
    from transformers import AriaTextConfig, AriaTextForCausalLM

    config = AriaTextConfig(**hf_config(size.model(), torch.bfloat16))
    build: Callable[..., Any] = AriaTextForCausalLM._from_config
    experts = {"experts_implementation": "grouped_mm"} if groups_experts() else {}
    with device:
        model = build(config, dtype=torch.bfloat16, **experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    windows = [batch.token_ids.view(-1, size.tokens).to(device) for batch in batches_of(size)]

    def run() -> None:
        for ids in windows:
            (model(input_ids=ids, labels=ids).loss / len(windows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def groups_experts() -> bool:
    """Whether transformers' Aria has grouped products: from 5.18 on."""
    return tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 18)


if __name__ == "__main__":
    main()
