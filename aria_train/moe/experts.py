"""Feed-forward networks of the MoE layer: the routed experts as grouped GEMMs, and the shared expert.

Shape legend: S rows, H hidden, E local experts, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aria_train import kernels
from aria_train.kernels import fp8
from aria_train.kernels.compiled import chain
from aria_train.kernels.experts import grouped_swiglu, mixture
from aria_train.kernels.feed_forward import swiglu_linear


class GroupedExperts(nn.Module):
    """E SwiGLU experts over rows sorted by expert. Weights multiply from the right, as released: `x @ W`."""

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * expert_size))
        self.down = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))

    mixes = True
    """Whether `forward` takes pairs."""
    fp8 = False
    """Whether products run in FP8; see `use_fp8`."""

    def forward(self, rows_SH: Tensor, offsets_E: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """rows [S, H] sorted by expert; offsets int32 [E], end row of each expert -> [S, H].

        With pairs, on a CPU: rows are tokens [T, H], pairs their numbers and weights sorted by expert, int64 and
        float32 [S]; gives the weighted sum of each token's experts, [T, H].
        """
        if pairs is not None:
            return mixture(rows_SH, *pairs, local(self.gate_up), local(self.down), offsets_E)
        if kernels.on_cpu(rows_SH):
            return grouped_swiglu(rows_SH, local(self.gate_up), local(self.down), offsets_E)
        return self.compose(rows_SH, offsets_E)

    def compose(self, rows_SH: Tensor, offsets_E: Tensor) -> Tensor:
        """The same, as separate grouped products."""
        return self.multiply("down", _swiglu_of(self.multiply("gate_up", rows_SH, offsets_E)), offsets_E)

    def multiply(self, name: str, rows_SI: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows times the weights of that name, each row its expert's."""
        return grouped_mm(rows_SI, local(getattr(self, name)), offsets_E, self.fp8)


class SharedExpert(nn.Module):
    """The SwiGLU every token passes through, ungated, added to the routed output."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, size, bias=False)
        self.up = nn.Linear(hidden_size, size, bias=False)
        self.down = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate(x_TH), self.up(x_TH)
        if kernels.by_hand(x_TH):
            return swiglu_linear(gate_TF, up_TF, self.down.weight)
        out: Tensor = self.down(_swiglu(gate_TF, up_TF))
        return out


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """From here on, routed experts of a model in bf16 multiply in FP8. Raises ConfigError where the device cannot."""
    fp8.require(device)
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.fp8 = True


def grouped_mm(rows_SI: Tensor, weight_EIO: Tensor, offsets_E: Tensor, in_fp8: bool = False) -> Tensor:
    """Rows times their expert's matrix: [S, I] sorted by expert, [E, I, O], end rows int32 [E] -> [S, O]."""
    if not rows_SI.shape[0]:
        return rows_SI @ weight_EIO[0]  # a kernel need not take nothing; weights get zero gradients
    if in_fp8:
        out: Tensor = fp8.grouped_mm(rows_SI, weight_EIO, offsets_E)
        return out
    return F.grouped_mm(rows_SI, weight_EIO, offs=offsets_E)


@chain
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@chain
def _swiglu_of(both: Tensor) -> Tensor:
    """Of gate and up side by side."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def local(parameter: Tensor) -> Tensor:
    """This rank's experts, where they are spread over an expert axis."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
