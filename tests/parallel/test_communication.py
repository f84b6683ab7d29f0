"""What moves between ranks in an optimizer step, and what each rank holds: observed, not assumed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aria_train.config import RunConfig
from aria_train.parallel import shard
from aria_train.parallel.gloo import DirectAllGather, DirectReduceScatter
from aria_train.plan.communication import communication
from aria_train.plan.layout import Layout, parameters_of
from tests.distributed import run_distributed
from tests.tiny import MODEL, tiny_config, unequal_corpora, with_values

pytestmark = pytest.mark.distributed

LAYERS = MODEL["num_layers"]
UNITS = 2 * LAYERS + 1
"""What is sharded as one: the experts of each layer, the rest of each layer, and all that is outside the layers."""


class Collectives(TorchDispatchMode):
    """Counts collective operations by name, with the bytes and dtypes of what they were given.

    What gloo does in shared memory and by exchanges counts under the names that other backends' have, and an all-to-all
    by what it moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
        self.waits = 0
        """For the device."""
        self.order: list[str] = []
        """Gathers and reductions, and copies of what was gathered into parameters."""
        self.patches = [
            mock.patch.object(DirectAllGather, "__call__", self.counted("_allgather_base_", DirectAllGather)),
            mock.patch.object(
                DirectReduceScatter, "__call__", self.counted("_reduce_scatter_base_", DirectReduceScatter)
            ),
        ]

    def __enter__(self) -> Self:
        for patch in self.patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") or name == "all_to_all":
            if name.startswith("all_to_all"):
                name = "tokens" if args[0].is_floating_point() else "token counts"
            if name not in ("send", "recv_"):
                self.count(name, args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0])
        elif name == "to_host":
            self.waits += 1
        elif func.namespace == "fsdp" and name == "split_with_sizes_copy":
            self.order.append("copied out")
        return func(*args, **(kwargs or {}))

    def count(self, name: str, given: Any) -> None:
        self.calls[name] += 1
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self.bytes[name] += tensor.numel() * tensor.element_size()
                self.dtypes[name].add(tensor.dtype)

    def counted(self, name: str, kind: type) -> Callable[..., None]:
        call = kind.__call__

        def counting(comm: Any, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.count(name, input_tensor)
            self.order.append(name)
            call(comm, output_tensor, input_tensor, *args, **kwargs)

        return counting


def observe_steps(config: RunConfig) -> dict[str, Any]:
    """Collectives of the second optimizer step (the first also sets things up), and what this rank holds after it."""
    from aria_train.train.trainer import Trainer

    trainer = Trainer(config)
    trainer._step(next(trainer.loader))
    batches = next(trainer.loader)
    with Collectives() as seen:
        metrics = trainer._step(batches)
    trainer.loader.close()
    model, optimizer = trainer.state.model, trainer.state.optimizer
    parameters = dict(model.named_parameters())
    held = {
        "master": sum(_bytes(p) for p in parameters.values()),
        "moments": sum(_bytes(s[k]) for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
        "experts": sum(_bytes(p) for name, p in parameters.items() if ".experts." in name),
    }
    return {
        "loss and norm": (metrics["loss"], metrics["grad_norm"]),
        "calls": dict(seen.calls),
        "bytes": dict(seen.bytes),
        "dtypes": dict(seen.dtypes),
        "order": seen.order,
        "waits": seen.waits,
        "held": held,
        "dtypes held": {_local(t).dtype for t in parameters.values()}
        | {s[k].dtype for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")},
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "parameters": {name: (tuple(p.shape), p.numel()) for name, p in parameters.items()},
    }


def observe_small(config: RunConfig, smallest: int) -> dict[str, Any]:
    """The same, where parameters share messages until there are that many."""
    shard.SMALLEST_UNIT = smallest
    return observe_steps(config)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensor: Tensor) -> int:
    return _local(tensor).numel() * tensor.element_size()


def observe_all(configs: list[RunConfig]) -> list[dict[str, Any]]:
    return [observe_steps(config) for config in configs]


def layout(base: RunConfig, run_dir: Path, expert: int, group: int | None, micro: int, precision: str) -> RunConfig:
    return with_values(
        base,
        parallel={"expert_parallel_size": expert, "zero_group_size": group},
        train={
            "micro_batch_size": micro,
            "precision": precision,
            "recompute": "selective" if micro == 1 else "none",  # which makes nothing move again
            "run_dir": str(run_dir),
        },
    )


CASES = {
    # name: (ranks, expert ranks, ranks per ZeRO group, micro-batch, precision); 12 windows per step
    "alone": (1, 1, None, 4, "fp32"),
    "ZeRO 2": (2, 1, None, 6, "fp32"),
    "ZeRO 2, micro-batch 1": (2, 1, None, 1, "fp32"),
    "ZeRO 2, bf16": (2, 1, None, 1, "bf16"),
    "EP 2": (2, 2, None, 3, "fp32"),
    "ZeRO 4": (4, 1, None, 3, "fp32"),
    "EP 2 x ZeRO 2": (4, 2, None, 3, "fp32"),
    "EP 2 x ZeRO 2, micro-batch 1": (4, 2, None, 1, "fp32"),
    "EP 2 x ZeRO 2, bf16": (4, 2, None, 1, "bf16"),
    "2 replicas of EP 2": (4, 2, 2, 1, "fp32"),
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank observed."""
    folder = tmp_path_factory.mktemp("communication")
    base = tiny_config(folder / "unused", unequal_corpora(folder / "corpora"))
    results = {}
    for ranks in (1, 2, 4):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        configs = [layout(base, folder / name, *CASES[name][1:]) for name in names]
        per_rank = run_distributed(observe_all, ranks, configs)
        results.update({name: [rank[index] for rank in per_rank] for index, name in enumerate(names)})
    return results


def test_what_is_gathered_is_copied_out_before_ranks_meet_again(observed: dict[str, list[dict[str, Any]]]) -> None:
    """Shared memory relies on it: once all have met twice more, what was gathered may be overwritten."""
    for name, ranks in observed.items():
        for rank in ranks:
            following = [after for now, after in pairwise(rank["order"]) if now == "_allgather_base_"]
            assert set(following) == ({"copied out"} if len(ranks) > 1 else set()), name


@pytest.mark.parametrize("name", CASES)
def test_one_all_gather_and_one_reduce_scatter_per_unit_and_step(name: str, observed: Any) -> None:
    ranks, expert, group, _, precision = CASES[name]
    data_ranks = {"experts": (group or ranks) // expert, "dense": group or ranks}
    # Nothing moves within a group of one.
    units = (LAYERS if data_ranks["experts"] > 1 else 0) + (LAYERS + 1 if data_ranks["dense"] > 1 else 0)
    # What neither moves nor changes its type is not sharded, and so not copied.
    alone = 0 if precision == "bf16" else (LAYERS if ranks == expert else 0) + (LAYERS + 1 if ranks == 1 else 0)
    for rank in observed[name]:
        assert rank["units"] == UNITS - alone
        assert rank["calls"].get("_allgather_base_", 0) == units
        assert rank["calls"].get("_reduce_scatter_base_", 0) == units


@pytest.mark.parametrize("name", ["ZeRO 2", "EP 2 x ZeRO 2, bf16"])
def test_small_layers_share_their_messages(name: str, observed: Any, tmp_path: Path) -> None:
    config = layout(tiny_config(tmp_path, unequal_corpora(tmp_path / "corpora")), tmp_path / "run", *CASES[name][1:])
    ranks, expert_ranks = CASES[name][:2]
    # Experts that are spread over ranks are reduced over others than the rest is.
    units = 1 if expert_ranks == 1 else LAYERS + 1
    for rank, apart in zip(run_distributed(observe_small, ranks, config, 10**9), observed[name], strict=True):
        assert rank["units"] == rank["calls"]["_allgather_base_"] == rank["calls"]["_reduce_scatter_base_"] == units
        assert rank["bytes"] == apart["bytes"]
        assert rank["loss and norm"] == apart["loss and norm"]
    with mock.patch.object(shard, "SMALLEST_UNIT", 10**9):
        planned = communication(config, parameters_of(config.model), Layout.of(config, ranks))
    calls = {kind: sum(c.calls for c in planned if c.kind == kind) for kind in ("all-gather", "reduce-scatter")}
    assert calls == {"all-gather": units, "reduce-scatter": units}


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_step_are_those_of_the_parameters(name: str, observed: Any) -> None:
    """Each rank gives its shard to the all-gather, in the precision of the computation, and the gradient of all that it
    computed with to the reduce-scatter, in float32."""
    ranks, expert, group, _, precision = CASES[name]
    group = group or ranks
    for rank in observed[name]:
        sizes = {parameter: numel for parameter, (_, numel) in rank["parameters"].items()}
        experts = sum(numel for parameter, numel in sizes.items() if ".experts." in parameter) // expert
        dense = sum(numel for parameter, numel in sizes.items() if ".experts." not in parameter)
        moving = (experts if group > expert else 0) + (dense if group > 1 else 0)
        shards = (experts * expert // group if group > expert else 0) + (dense // group if group > 1 else 0)
        assert rank["bytes"].get("_allgather_base_", 0) == shards * (2 if precision == "bf16" else 4)
        assert rank["bytes"].get("_reduce_scatter_base_", 0) == moving * 4
        assert rank["dtypes"].get("_reduce_scatter_base_", {torch.float32}) == {torch.float32}


def test_replicas_add_their_shards_once(observed: Any) -> None:
    """Hybrid sharding: one more all-reduce per unit, of a shard, and otherwise the three small ones of every step."""
    rank = observed["2 replicas of EP 2"][0]
    small = observed["EP 2 x ZeRO 2, micro-batch 1"][0]
    assert rank["calls"]["allreduce_"] == small["calls"]["allreduce_"] + UNITS
    assert rank["bytes"]["allreduce_"] == small["bytes"]["allreduce_"] + rank["held"]["master"]


@pytest.mark.parametrize("name", ["EP 2", "EP 2 x ZeRO 2", "EP 2 x ZeRO 2, micro-batch 1"])
def test_tokens_move_four_times_per_layer_and_micro_batch(name: str, observed: Any) -> None:
    """To the experts and back, forward and backward; before that, each rank tells the others how many to expect."""
    ranks, _, _, micro, _ = CASES[name]
    passes = LAYERS * 12 // ranks // micro
    for rank in observed[name]:
        assert rank["calls"]["tokens"] == 4 * passes
        assert rank["calls"]["token counts"] == rank["waits"] == passes


@pytest.mark.parametrize("name", CASES)
def test_master_weights_and_optimizer_state_shrink_as_one_over_ranks(name: str, observed: Any) -> None:
    ranks, _, group, _, _ = CASES[name]
    alone = observed["alone"][0]["held"]
    for rank in observed[name]:
        assert rank["held"]["master"] == alone["master"] / (group or ranks)
        assert rank["held"]["moments"] == alone["moments"] / (group or ranks)
        assert rank["dtypes held"] == {torch.float32}
    assert sum(rank["held"]["experts"] for rank in observed[name]) == alone["experts"] * ranks / (group or ranks)


def test_small_reductions_do_not_depend_on_micro_batches(observed: Any) -> None:
    assert (
        observed["ZeRO 2"][0]["calls"]["allreduce_"] == observed["ZeRO 2, micro-batch 1"][0]["calls"]["allreduce_"] == 3
    )
