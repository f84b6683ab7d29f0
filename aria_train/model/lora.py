"""Low-rank adapters (arXiv 2106.09685) on the attention projections and, one pair per expert, on the experts.

    y = x W + (alpha / rank) * (x A) B        W frozen, A random, B zero at first

The adapters are parameters of the layers that they adapt, beside the frozen weight, which keeps its name. So they are
sharded, spread over expert ranks, and saved like any other. In files of their own they have PEFT's names and layouts.

Shape legend: E experts, R rank, S rows; a linear layer maps I to O, as does an expert's weight [E, I, O].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train.config import LoraConfig
from aria_train.model.decoder import DecoderLayer
from aria_train.model.hf.names import published_name, text_only
from aria_train.moe.experts import GroupedExperts, grouped_mm, local

_PROJECTIONS = ("q", "k", "v", "o")
_EXPERT_WEIGHTS = ("gate_up", "down")


class LoraLinear(nn.Linear):
    """A linear layer without bias, and its adapter."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.scale = config.scale
        self.lora_A = nn.Parameter(base.weight.new_empty(config.rank, base.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, config.rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoraExperts(GroupedExperts):
    """Experts, and an adapter for each weight of each: grouped GEMMs through the rank and back."""

    def __init__(self, base: GroupedExperts, config: LoraConfig) -> None:
        super().__init__(0, 0, 0)
        self.scale = config.scale
        for name in _EXPERT_WEIGHTS:
            weight = getattr(base, name)
            experts, inner, outer = weight.shape
            setattr(self, name, weight)
            for letter, shape in (("A", (experts, inner, config.rank)), ("B", (experts, config.rank, outer))):
                setattr(self, f"{name}_lora_{letter}", nn.Parameter(weight.new_empty(shape, dtype=torch.float32)))

    mixes = False

    def forward(self, rows_SH: Tensor, offsets_E: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        assert pairs is None
        return self.compose(rows_SH, offsets_E)

    def multiply(self, name: str, rows_SI: Tensor, offsets_E: Tensor) -> Tensor:
        a_EIR, b_ERO = (local(getattr(self, f"{name}_lora_{letter}")) for letter in "AB")
        added_SO = grouped_mm(grouped_mm(rows_SI, a_EIR, offsets_E), b_ERO, offsets_E)
        return super().multiply(name, rows_SI, offsets_E) + self.scale * added_SO


def add_adapters(model: nn.Module, config: LoraConfig, frozen_dtype: torch.dtype) -> None:
    """Freezes a model (on the meta device) and gives it adapters, the only parameters to be trained.

    What is frozen needs no master copy: it is kept in `frozen_dtype`.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(frozen_dtype)
    for layer in cast("list[DecoderLayer]", list(cast(nn.ModuleList, model.layers))):
        if "attention" in config.targets:
            for name in _PROJECTIONS:
                setattr(layer.attention, name, LoraLinear(getattr(layer.attention, name), config))
        if "experts" in config.targets:
            layer.moe.experts = LoraExperts(layer.moe.experts, config)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return name.endswith(("lora_A", "lora_B"))


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@dataclass
class Adapters:
    """All adapters of a model, whole: for merging, and for files."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    """Our name of each adapter parameter -> float32, as `adapter_shapes` says."""

    def adapts(self, weight: str) -> bool:
        return f"{_stem(weight)}lora_A" in self.tensors

    def delta(self, weight: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """What merging adds to the box of a weight that begins at `offsets` and has this shape."""
        a, b = self.tensors[f"{_stem(weight)}lora_A"], self.tensors[f"{_stem(weight)}lora_B"]
        *_, rows, columns = (slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
        if len(shape) == 2:
            return self.config.scale * (b[rows] @ a[:, columns])
        experts = slice(offsets[0], offsets[0] + shape[0])
        return self.config.scale * torch.bmm(a[experts, rows], b[experts, :, columns])


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Our name -> whole shape of every adapter parameter of a model."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}


def _stem(weight: str) -> str:
    """`layers.0.attention.q.weight` -> `layers.0.attention.q.`; `....experts.down` -> `....experts.down_`."""
    return weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's names and layouts


def to_peft(adapters: Adapters, has_vision: bool) -> dict[str, Tensor]:
    """The adapters as PEFT keeps them for transformers' Aria."""
    return {
        peft_name(name, has_vision): _to_peft_layout(name, tensor).contiguous()
        for name, tensor in sorted(adapters.tensors.items())
    }


def from_peft(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], has_vision: bool
) -> dict[str, Tensor]:
    """Our adapters out of PEFT's tensors. Raises KeyError for one that is missing, ValueError for a wrong shape or a
    tensor too many."""
    left = dict(tensors)
    ours = {}
    for name, shape in shapes.items():
        there = peft_name(name, has_vision)
        ours[name] = _from_peft_layout(name, left.pop(there), shape)
    if left:
        raise ValueError(f"{len(left)} tensor(s) too many, such as {next(iter(left))}")
    return ours


def peft_name(name: str, has_vision: bool) -> str:
    """`layers.0.attention.q.lora_A` -> `base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight`.

    PEFT wraps the two weights of the experts one around the other, `gate_up` inside.
    """
    stem, letter = name[: -len("lora_A")], name[-len("lora_A") :]
    weight = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
    module = re.sub(r"\.fc[12]\.weight$|\.weight$", "", published_name(weight))
    module = module.replace("language_model.model.", "model.language_model.", 1) if has_vision else text_only(module)
    inside = ".base_layer" if weight.endswith(".gate_up") else ""
    return f"base_model.model.{module}{inside}.{letter}.weight"


def _to_peft_layout(name: str, tensor: Tensor) -> Tensor:
    """Experts stand in rows of A, [E * R, I], and in columns of B, [O, R * E], there varying fastest."""
    if tensor.ndim == 2:
        return tensor
    if name.endswith("lora_A"):
        return tensor.transpose(1, 2).flatten(0, 1)
    return tensor.permute(2, 1, 0).flatten(1)


def _from_peft_layout(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    expected = tuple(_to_peft_layout(name, torch.empty(shape, device="meta")).shape)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is {list(tensor.shape)} there, and this model needs {list(expected)}")
    if len(shape) == 2:
        return tensor
    if name.endswith("lora_A"):
        return tensor.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    return tensor.unflatten(1, (shape[1], shape[0])).permute(2, 1, 0)


def peft_config(config: LoraConfig, has_vision: bool, base: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    projections = "|".join(_PROJECTIONS)
    owner = r".*language_model\..*" if has_vision else ".*"
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": rf"{owner}self_attn\.({projections})_proj" if "attention" in config.targets else [],
        "target_parameters": [f"mlp.experts.{name}_proj" for name in _EXPERT_WEIGHTS]
        if "experts" in config.targets
        else None,
        "task_type": None,
    }
