"""AdamW by another library's kernel: here one in PyTorch, with the signature that apex and Transformer Engine share."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from aria_train.errors import ConfigError
from aria_train.train.multi_tensor import MultiTensorAdamW, find_update
from aria_train.train.optimizer import create_moments
from tests.distributed import run_distributed

CUDA = torch.device("cuda")


def adam(overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, *rest: Any):
    """The update of arXiv 1711.05101, one tensor after the other."""
    step, decoupled, corrected, decay = rest
    assert (overflow.dtype, overflow.shape, decoupled, corrected) == (torch.int32, (1,), 1, 1)
    for grad, parameter, mean, square in zip(*lists, strict=True):
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(lr * (update + decay * parameter))


def both(decays: tuple[float, float] = (0.1, 0.0)) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Two optimizers of one setting over equal parameters."""
    torch.manual_seed(0)
    ours = [torch.randn(5, 3), torch.randn(4), torch.randn(2, 2)]
    theirs = [p.clone() for p in ours]
    for p in ours + theirs:
        p.requires_grad_()
    options = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}

    def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
        split = zip((parameters[:2], parameters[2:]), decays, strict=True)
        return [{"params": part, "weight_decay": decay} for part, decay in split]

    mine = MultiTensorAdamW(groups(ours), adam, **options)  # type: ignore[arg-type]
    create_moments(mine)
    return ours, theirs, mine, torch.optim.AdamW(groups(theirs), fused=True, **options)  # type: ignore[arg-type]


def step(ours: list[Tensor], theirs: list[Tensor], *optimizers: torch.optim.Optimizer, without: int | None = None):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.grad = b.grad = None if index == without else torch.randn_like(a)
    for optimizer in optimizers:
        optimizer.step()


def test_the_same_steps_as_torch() -> None:
    ours, theirs, mine, reference = both()
    for number in range(5):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.05 / (number + 1)
        step(ours, theirs, mine, reference, without=1 if number == 2 else None)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[a][key], reference.state[b][key])


def test_goes_on_from_what_torch_has_moved() -> None:
    """Parameters whose moments come from elsewhere have counted steps of their own."""
    ours, theirs, mine, reference = both()
    step(ours, theirs, reference)
    for a, b in zip(ours, theirs, strict=True):
        reference.state[b]["step"].add_(7 if a.ndim == 1 else 0)
        a.data.copy_(b)
        mine.state[a] = {key: value.clone() for key, value in reference.state[b].items()}
    step(ours, theirs, mine, reference)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def _sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    whole = torch.randn(5, 3)
    parameter = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)]))
    plain = whole.clone().requires_grad_()
    plain.grad = torch.randn(5, 3)
    parameter.grad = distribute_tensor(plain.grad, parameter.device_mesh, [Shard(0)])
    optimizer = MultiTensorAdamW([{"params": [parameter]}], adam, lr=0.1)
    create_moments(optimizer)
    optimizer.step()
    torch.optim.AdamW([plain], lr=0.1).step()
    torch.testing.assert_close(parameter.full_tensor(), plain)


def test_shards_move_where_they_lie() -> None:
    run_distributed(_sharded, 2)


@pytest.mark.parametrize("kernel", ["apex", "transformer_engine"])
def test_an_absent_library_is_named_with_the_alternative(kernel: Any) -> None:
    with pytest.raises(ConfigError, match=rf"kernel={kernel}: No module named .*\. Install it .*kernel=torch"):
        find_update(kernel, CUDA)


@pytest.mark.parametrize("kernel", ["apex", "transformer_engine"])
def test_no_kernel_for_a_cpu(kernel: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU; this run is on cpu\. .*kernel=torch"):
        find_update(kernel, torch.device("cpu"))


def test_another_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `apex` is something else."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", ModuleType("apex.multi_tensor_apply"))
    with pytest.raises(ConfigError, match="no attribute 'multi_tensor_applier'"):
        find_update("apex", CUDA)


def test_the_library_gets_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    applier, extension = ModuleType("transformer_engine.pytorch.optimizers"), ModuleType("transformer_engine_torch")
    extension.multi_tensor_adam = adam  # type: ignore[attr-defined]
    calls: list[tuple[Any, ...]] = []
    applier.multi_tensor_applier = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, applier.__name__, applier)
    monkeypatch.setitem(sys.modules, extension.__name__, extension)
    find_update("transformer_engine", CUDA)("overflow", "lists", 1, 2)
    assert calls == [(adam, "overflow", "lists", 1, 2)]
