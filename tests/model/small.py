"""A small model of ours, and what tests compare it by."""

from __future__ import annotations

import torch
from torch import Tensor

from aria_train.config import ModelConfig, VisionConfig
from aria_train.model import AriaModel
from tests.model.released import randomise

SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    top_k=2,
    expert_size=12,
    vision=VisionConfig(
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        mlp_size=40,
        patch_size=2,
        position_grid=8,
        image_sizes={8: 3, 16: 6},
        min_image_size=4,
    ),
)
TEXT_ONLY = SMALL.model_copy(update={"vision": None})


def our_model(config: ModelConfig = SMALL) -> AriaModel:
    model = AriaModel(config)
    randomise(model, seed=1)
    return model


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
