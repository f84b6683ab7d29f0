"""Everything parallel that is done to the model, as one list of decisions: `parallelize`.

ZeRO-1 through FSDP2: parameters are gathered once per optimizer step and stay whole over all its micro-batches;
gradients accumulate locally in float32 and are reduce-scattered once, in the last micro-batch's backward pass. Master
weights and optimizer state live in float32 shards.

A group of one rank has nothing to gather: where it computes in float32, it does so with the master weights themselves.

Gradients are plain sums over ranks, for dense and expert parameters alike, because the loss each rank differentiates
is already divided by totals of the global batch. So no factor depends on the layout.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from aria_train.model import AriaModel
from aria_train.model.decoder import DecoderLayer
from aria_train.moe.dispatch import AllToAllDispatcher
from aria_train.parallel.exchange import Exchange
from aria_train.parallel.gloo import exchange_directly
from aria_train.parallel.mesh import Meshes

SMALLEST_UNIT = 1 << 20
"""Parameters that are worth messages of their own. What is gained by sending one layer's while the next computes is
lost again where a message takes longer to start than to send."""


def parallelize(model: AriaModel, meshes: Meshes, precision: str) -> AriaModel:
    """Spreads a model (on the meta device) over the meshes; afterwards `to_empty` and initialise or load it.

    Each `shard` is one all-gather and one reduce-scatter per optimizer step.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    experts_of_layers: set[nn.Parameter] = set()
    own_experts: set[nn.Parameter] = set()
    in_units: set[nn.Parameter] = set()
    sharded: dict[FSDPModule, DeviceMesh] = {}

    def place(parameter: nn.Parameter) -> Shard | None:
        return expert_shard(parameter, meshes.expert_data.size(-1)) if parameter in experts_of_layers else None

    def shard(module: nn.Module, mesh: DeviceMesh = meshes.dense_data, smallest: int = SMALLEST_UNIT) -> None:
        left = set(module.parameters()) - own_experts - in_units
        if (mesh.size() > 1 or precision == "bf16") and sum(p.numel() for p in left) >= smallest:
            options: dict[str, Any] = {"mp_policy": policy, "shard_placement_fn": place, "ignored_params": own_experts}
            fully_shard(module, mesh=mesh, reshard_after_forward=False, **options)
            in_units.update(module.parameters())
            sharded[cast(FSDPModule, module)] = mesh

    layers = cast("list[DecoderLayer]", list(model.layers))
    spread_experts(layers, meshes.expert)
    for layer in layers:
        experts = layer.moe.experts
        experts_of_layers.update(experts.parameters())
        if meshes.expert.size() == 1:  # the same ranks hold experts and all else, so small ones can share messages
            shard(experts)
        else:
            shard(experts, meshes.expert_data, smallest=0)
            if not isinstance(experts, FSDPModule):
                own_experts.update(experts.parameters())
        shard(layer)
    if model.vision is not None and model.projector is not None:
        for block in model.vision.layers:
            shard(block)
        shard(model.vision)
        shard(model.projector)
    shard(model, smallest=0)
    if isinstance(model, FSDPModule):
        for method in ("logits", "target_logits"):
            register_fsdp_forward_method(model, method)
    for module, mesh in sharded.items():
        if mesh.size() > 1:  # alone there is nothing to divide by, and FSDP2 would take a copy to divide it by one
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    exchange_directly(sharded)
    return model


def spread_experts(layers: list[DecoderLayer], mesh: DeviceMesh) -> None:
    """Gives this rank its consecutive share of each layer's experts, and the layers the dispatcher that reaches all."""
    if mesh.size() == 1:
        return
    dispatcher = AllToAllDispatcher(Exchange(mesh.get_group()))
    for layer in layers:
        experts = layer.moe.experts
        for name, parameter in list(experts.named_parameters()):
            local = parameter.new_empty(parameter.shape[0] // mesh.size(), *parameter.shape[1:])
            spread = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        layer.moe.dispatcher = dispatcher


def expert_shard(parameter: nn.Parameter, num_ranks: int) -> Shard:
    """Whole experts per rank while there are enough; beyond that, equal rows of every expert."""
    local_shape = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    return Shard(0) if local_shape[0] % num_ranks == 0 or local_shape[1] % num_ranks else Shard(1)


def set_last_micro_batch(model: nn.Module, is_last: bool) -> None:
    """Before the last micro-batch of a step: its backward pass reduces the gradients and lets the parameters go."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
        model.set_is_last_backward(is_last)


def release_parameters(model: nn.Module) -> None:
    """Lets go of the whole parameters that a forward pass without a backward pass keeps: until then the model's
    parameters are not the shards that the optimizer moves and checkpoints hold. Does nothing to shards."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter lies on the expert mesh, by its name."""
    return ".moe.experts." in name
