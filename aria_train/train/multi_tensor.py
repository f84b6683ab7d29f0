"""AdamW's update by a multi-tensor kernel of apex or Transformer Engine instead of PyTorch's fused one.

Moments, step counts and groups are those of torch.optim.AdamW, so checkpoints do not depend on the kernel. Seen to work
on a CPU, with a kernel written in PyTorch in place of theirs; not yet on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aria_train.config import AdamKernel
from aria_train.errors import ConfigError

Update = Callable[..., None]
"""`update(overflow, [gradients, parameters, first moments, second moments], lr, beta1, beta2, eps, step, decoupled,
bias_correction, weight_decay)`, in place. Overflow int32 [1] is set where gradients are not finite."""

_KERNELS = {
    "apex": ("apex.multi_tensor_apply", "amp_C", "https://github.com/NVIDIA/apex, built with its CUDA extensions"),
    "transformer_engine": (
        "transformer_engine.pytorch.optimizers",
        "transformer_engine_torch",
        "pip install transformer-engine[pytorch]",
    ),
}


class MultiTensorAdamW(torch.optim.AdamW):
    """torch.optim.AdamW in all but who computes the update. Moments must be there before the first."""

    def __init__(self, groups: Iterable[dict[str, Any]], update: Update, **options: Any) -> None:
        super().__init__(groups, **options)
        self._update = update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            # One wait for the device: parameters whose moments came from another run have counted more steps.
            steps = torch.stack([self.state[p]["step"].add_(1) for p in moved]).tolist() if moved else []
            for step in set(steps):
                self._move(group, [p for p, at in zip(moved, steps, strict=True) if at == step], int(step))

    def _move(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        states = [self.state[p] for p in parameters]
        lists = [
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(p) for p in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
        ]
        overflow = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)
        decoupled, corrected = 1, 1
        betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
        self._update(overflow, lists, group["lr"], *betas, eps, step, decoupled, corrected, decay)


def find_update(kernel: AdamKernel, device: torch.device) -> Update:
    """The library's kernel. Raises ConfigError if the library is not there, or no use here."""
    applier_module, extension, how = _KERNELS[kernel]
    instead = "or set optimizer.kernel=torch, PyTorch's own: the same update, fused too."
    if device.type != "cuda":
        raise ConfigError(f"optimizer.kernel={kernel} needs a GPU; this run is on {device.type}. Use one, {instead}")
    try:
        applier = import_module(applier_module).multi_tensor_applier
        update = import_module(extension).multi_tensor_adam
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(f"optimizer.kernel={kernel}: {error}. Install it ({how}), {instead}") from error
    return lambda overflow, lists, *numbers: applier(update, overflow, lists, *numbers)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
