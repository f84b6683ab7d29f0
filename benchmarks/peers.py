"""Aria as others implement it, with our weights."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from aria_train.config import ModelConfig
from aria_train.model import AriaModel
from aria_train.model.hf import save_pretrained


def transformers_aria(model: AriaModel) -> Any:
    """transformers' Aria: the text model where ours has no vision encoder, the whole one where it has."""
    from transformers import AriaForConditionalGeneration, AriaTextForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = AriaTextForCausalLM if model.vision is None else AriaForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, f"{folder}/aria")
        theirs = kind.from_pretrained(f"{folder}/aria", dtype=model.embed.weight.dtype)
    return theirs.train()


def aria(config: ModelConfig, dtype: torch.dtype) -> AriaModel:
    """Ours, from seed 0."""
    return AriaModel(config).to(dtype)
