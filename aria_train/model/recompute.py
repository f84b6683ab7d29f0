"""Activation recomputation: which activations of a layer are kept for the backward pass.

`full` keeps a layer's input alone. `selective` keeps what is dear to compute (GEMMs, attention, all-to-all, the
router's choice) and recomputes what is cheap (norms, rotations, SwiGLU, permutations).
Routing statistics are outputs of the layer, not side effects, so recomputation counts nothing twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

_DEAR = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_grouped_mm",
        "aria_train::experts",
        "aria_train::fp8_grouped_mm",
        "aten::topk",
        "aten::sort",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "_c10d_functional::all_to_all_single",
        "aria_train::all_to_all",
        "aria_train::to_host",
    }
)


# FSDP2 names what it does for the profiler: more or less of it when a layer is computed again, which PyTorch would take
# for another computation.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def run_layer(layer: nn.Module, x: Tensor, documents: Any, recompute: Recompute) -> Any:
    """Calls the layer, recomputing in the backward pass what the policy drops."""
    if recompute == "none" or not torch.is_grad_enabled():
        return layer(x, documents)
    run = partial(checkpoint, layer, x, documents, use_reentrant=False, preserve_rng_state=False)
    if recompute == "selective":
        return run(context_fn=partial(create_selective_checkpoint_contexts, _policy))
    return run()


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0] if hasattr(operator, "name") else ""
    return CheckpointPolicy.MUST_SAVE if name in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
