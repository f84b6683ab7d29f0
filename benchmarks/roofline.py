"""What a GPU does in a training step at Aria's full width, worked out on any machine: launches, products, memory moved.

    python -m benchmarks.roofline [--tflops 700] [--bandwidth 3350] [--launch 10]

The model runs forward and backward on meta tensors, which have shapes and no values, by the very code that a GPU runs;
every operator is counted with the bytes it reads and writes. Products are taken at `--tflops` TFLOP/s, all else at
`--bandwidth` GB/s (an H100's), launches at `--launch` microseconds of the host each. Nothing overlaps and nothing is
fused, so this is what `train.compile` starts from. Writes a table into docs/performance.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig
from aria_train.data.work import forward_flops
from aria_train.model import AriaModel
from benchmarks.page import fill

PAGE = Path("docs/performance.md")
TOKENS = 8192
PRODUCTS = ("mm", "bmm", "addmm", "_grouped_mm", "_varlen_attn", "_varlen_attn_backward")
SPARSE = ("gather", "index_put_", "index_add_", "scatter", "embedding")
"""Touch as many elements as are picked, not all of their largest operand."""
PER_WEIGHT = {
    "adding its gradients up, per micro-batch": 2 + 8,
    "its update, once per step and divided among ranks": 4 + 8 + 28 + 6,
}
"""Bytes moved: a gradient in bf16, the sum in float32; norm, clipping, AdamW on four tensors, the weight in bf16."""


class Tally(TorchDispatchMode):
    """Launches and bytes by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            self.launches[name] += 1
            self.bytes[name] += moved_by(name, args, kwargs, out)
        return out

    @property
    def between_products(self) -> int:
        return sum(count for name, count in self.bytes.items() if name not in PRODUCTS)


def moved_by(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes read and written, each tensor once; what is expanded counts as what is stored."""
    tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}.values()
    sizes = sorted(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in tensors)
    return sum(sizes[:-1]) if name in SPARSE else sum(sizes)


def step(config: ModelConfig) -> Tally:
    """One window of one document, in bf16."""
    model = meta_model(config)
    with torch.device("meta"):
        ids = torch.zeros(TOKENS, dtype=torch.int64)
        starts = torch.zeros(2, dtype=torch.int32)
        batch = MicroBatch(ids, ids, starts, TOKENS, torch.zeros(1, dtype=torch.int64), target_positions=ids)
    with Tally() as tally:
        output = model(batch)
        (output.loss_sum + output.router.z_sum.sum() + output.router.prob_sums.sum()).backward()
    return tally


def meta_model(config: ModelConfig) -> AriaModel:
    with torch.device("meta"):
        return AriaModel(config).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("--tflops", type=float, default=700, help="of matrix products in bf16")
    parser.add_argument("--bandwidth", type=float, default=3350, help="of the memory, GB/s")
    parser.add_argument("--launch", type=float, default=10, help="microseconds of the host per operator")
    arguments = parser.parse_args()
    one, two = (ModelConfig(num_layers=layers, vision=None) for layers in (1, 2))
    tallies = [step(config) for config in (one, two)]
    launches = [tally.launches.total() for tally in tallies]
    traffic = [tally.between_products for tally in tallies]
    flops = [3 * forward_flops([TOKENS], [], config) for config in (one, two)]

    lines = [
        "| part | TFLOP | products | between them | | launches | host |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    totals = [0.0, 0.0]
    layers = ModelConfig().num_layers
    for name, count, of in (("a decoder layer", layers, _increase), ("embedding, head and loss", 1, _without_layers)):
        products, between = of(flops) / arguments.tflops / 1e9, of(traffic) / arguments.bandwidth / 1e6
        host = of(launches) * arguments.launch / 1e3
        lines.append(
            f"| {name} | {of(flops) / 1e12:.1f} | {products:.1f} ms | {between:.1f} ms | {of(traffic) / 1e9:.1f} GB "
            f"| {of(launches):.0f} | {host:.1f} ms |"
        )
        totals = [totals[0] + count * of(flops), totals[1] + count * (products + between) / 1e3]
    weights = _increase([sum(p.numel() for p in meta_model(config).parameters()) for config in (one, two)])
    for what, each in PER_WEIGHT.items():
        time, size = f"{weights * each / arguments.bandwidth / 1e6:.1f} ms", f"{weights * each / 1e9:.1f} GB"
        lines.append(f"| a layer whose experts all lie on one GPU: {what} | | | {time} | {size} | | |")
    rate = totals[0] / totals[1] / 1e12
    text = (
        f"Calculated for {TOKENS:,} tokens at {arguments.tflops:.0f} TFLOP/s, {arguments.bandwidth:.0f} GB/s and "
        f"{arguments.launch:g} µs per launch, nothing overlapped or fused: {rate:.0f} TFLOP/s by activated parameters "
        f"with {layers} layers, before gradients are added up and weights updated.\n\n" + "\n".join(lines)
    )
    print(text)
    fill(PAGE, "what a GPU's step moves", text)


def _increase(pair: list[Any]) -> float:
    return float(pair[1] - pair[0])


def _without_layers(pair: list[Any]) -> float:
    return float(2 * pair[0] - pair[1])


if __name__ == "__main__":
    main()
