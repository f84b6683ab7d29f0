"""Activations, found by running the model's own code on fake tensors, which have a shape and no data.

What a layer keeps for the backward pass grows in proportion to the tokens and does not depend on the other layers, so
one and two layers tell of any number. Routing is taken to be balanced and each window to be one document.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.config import ModelConfig, RunConfig
from aria_train.model import AriaModel
from aria_train.model.decoder import DecoderLayer
from aria_train.model.recompute import Recompute
from aria_train.parallel.shard import spread_experts


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank in one micro-batch."""

    kept: int
    """For the backward pass, when the forward pass has come to the output head."""
    head: int
    """Beyond that, at the most, while the head and the loss are computed."""
    working: int
    """Beyond that, at the most, in the backward pass."""


def trace(config: RunConfig, expert_ranks: int, num_images: int = 0) -> Activations:
    """Of this configuration's micro-batch, with `num_images` images of the largest size class in it."""
    train = config.train
    model = config.model.model_copy(update={"preset": None})
    arguments = (train.micro_batch_size, train.context_length, train.precision, train.recompute, expert_ranks)
    one, two = (_trace(_with_layers(model, layers), *arguments, num_images) for layers in (1, 2))
    more = model.num_layers - 1
    kept = one.kept + more * (two.kept - one.kept)
    if model.vision is not None and num_images:
        blocks = _trace(_with_layers(model, 1, vision_layers=2), *arguments, num_images)
        kept += (model.vision.num_layers - 1) * (blocks.kept - one.kept)
    return Activations(kept, max(one.head, two.head), max(one.working, two.working))


def _with_layers(model: ModelConfig, layers: int, vision_layers: int = 1) -> str:
    vision = model.vision.model_copy(update={"num_layers": vision_layers}) if model.vision else None
    return model.model_copy(update={"num_layers": layers, "vision": vision}).model_dump_json()


@cache
def _trace(
    model_json: str,
    windows: int,
    length: int,
    precision: str,
    recompute: Recompute,
    expert_ranks: int,
    num_images: int,
) -> Activations:
    config = ModelConfig.model_validate_json(model_json)
    tokens = windows * length
    with _expert_mesh(expert_ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(config, precision, mesh)
        model.set_recompute(recompute)
        batch, known = make_batch(config, windows, length, num_images)
        meter = Meter(config.num_experts, tokens * config.top_k // expert_ranks, known)
        for parameter in model.parameters():
            # Gradients are counted elsewhere.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            meter.leave_out(parameter)
        with meter:
            hidden_TH, router = model.hidden_states(batch)
            kept = meter.live
            meter.peak = kept
            loss_sum, _ = model.loss(hidden_TH, batch)
            head = meter.peak - kept
            objective = loss_sum + router.prob_sums.sum() + router.z_sum.sum()
            meter.peak = meter.live
            del hidden_TH, router
            objective.backward()
        return Activations(kept, head, meter.peak - kept)


@contextmanager
def _expert_mesh(ranks: int) -> Iterator[DeviceMesh | None]:
    """Over a process group of which this process plays the first rank and nobody the others; None for one rank."""
    if ranks == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def _build(config: ModelConfig, precision: str, mesh: DeviceMesh | None) -> AriaModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        with unset_fake_temporarily(), torch.device("meta"):
            model = AriaModel(config)
        model.to_empty(device="cpu")
        if mesh is not None:
            spread_experts(cast("list[DecoderLayer]", list(model.layers)), mesh)
    finally:
        torch.set_default_dtype(before)
    return model


def make_batch(
    config: ModelConfig, windows: int, length: int, num_images: int
) -> tuple[MicroBatch, dict[Tensor, list[int]]]:
    """Windows of one document each, every position a target; and what is in its tensors that the model looks at."""
    ids = torch.zeros(windows * length, dtype=torch.int64)
    starts = torch.zeros(windows + 1, dtype=torch.int32)
    known = {starts: [window * length for window in range(windows + 1)]}
    positions = torch.arange(windows * length)
    sources = torch.zeros(windows, dtype=torch.int64)
    batch = MicroBatch(ids, ids, starts, length, sources, target_positions=positions)
    if config.vision is not None and num_images:
        size, queries = max(config.vision.image_sizes.items())
        patches = (size // config.vision.patch_size) ** 2
        pixels = torch.zeros(num_images * patches, 3 * config.vision.patch_size**2)
        image_starts = torch.zeros(num_images + 1, dtype=torch.int32)
        known[image_starts] = [image * patches for image in range(num_images + 1)]
        where = torch.zeros(num_images * patches, dtype=torch.int64)
        batch.images = ImageBatch(pixels, where, image_starts, [queries] * num_images)
        batch.visual_positions = positions[: num_images * queries]
    return batch, known


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Of the shape of rows times each group's matrix, or of each group's rows times rows. PyTorch's own shape function
    knows no float32, its kernels do."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


class Meter(TorchDispatchMode):
    """Bytes of all storages that were made within it and are still alive.

    Where the model asks for numbers, those that follow from tensors whose values are known are worked out; what is left
    is how many rows go to and come from each rank.
    """

    def __init__(self, num_experts: int, rows_per_rank: int, known: dict[Tensor, list[int]]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._num_experts, self._rows_per_rank = num_experts, rows_per_rank
        self._seen: set[int] = set()
        with unset_fake_temporarily():
            self._values: Any = WeakIdKeyDictionary({fake: torch.tensor(known[fake]) for fake in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            value = self._values.get(args[0])
            with unset_fake_temporarily():
                return self._rows_per_rank if value is None else value.item()
        # What depends on the data is answered as if every expert were chosen equally often.
        if func is torch.ops.aten.bincount.default:
            out: Any = torch.zeros(self._num_experts, dtype=torch.int64)
        elif func is torch.ops.aten._grouped_mm.default:
            out = _grouped_product(*args[:3])
        else:
            out = func(*args, **kwargs)
            self._follow(out, func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _follow(self, out: Any, func: Any, args: Any, kwargs: Any) -> None:
        """Works the values out where those of all arguments are known."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given or any(tensor not in self._values for tensor in given):
            return

        def value(leaf: Any) -> Any:
            return self._values[leaf] if isinstance(leaf, Tensor) else leaf

        with unset_fake_temporarily():
            values = func(*tree_map(value, args), **tree_map(value, kwargs))
        pairs = zip(tree_leaves(out), tree_leaves(values), strict=True)
        self._values.update((fake, value) for fake, value in pairs if isinstance(fake, Tensor))

    def leave_out(self, tensor: Tensor) -> None:
        """Views of a tensor that outlives the meter are not counted."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        self._seen.add(storage._cdata)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
