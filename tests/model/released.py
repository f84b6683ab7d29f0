"""The released model as transformers implements it, with random weights: what ours is compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from aria_train.model.hf.names import canonical, published_name


@dataclass
class Sizes:
    """A model small enough for a test. The defaults are one of each kind of thing."""

    vocab: int = 48
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 4
    head_dim: int | None = None
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    expert_size: int = 12
    shared: int = 2
    rope_base: float = 10_000.0
    vision_hidden: int = 24
    vision_heads: int = 3
    vision_layers: int = 2
    vision_mlp: int = 40
    patch: int = 2
    image_sizes: dict[int, int] = field(default_factory=lambda: {8: 3, 16: 6})


def released_model(sizes: Sizes, seed: int = 0) -> AriaForConditionalGeneration:
    """fp32, with every parameter random: norms and biases too, so that none can be left out unnoticed."""
    text = AriaTextConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.expert_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        moe_num_experts=sizes.experts,
        moe_topk=sizes.top_k,
        moe_num_shared_experts=sizes.shared,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_base},
    )
    vision = Idefics3VisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=max(sizes.image_sizes),
        patch_size=sizes.patch,
    )
    queries = {(size // sizes.patch) ** 2: count for size, count in sizes.image_sizes.items()}
    model = AriaForConditionalGeneration(
        AriaConfig(text_config=text, vision_config=vision, projector_patch_to_query_dict=queries)
    )
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise *= (2 if "router" in name else 1) / parameter[0].numel() ** 0.5
            parameter.copy_(noise)
        else:
            parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


@dataclass
class Picture:
    """One image of height x width pixels, as each side wants it."""

    whole_patches: Tensor
    """[3, H, W], padded with -1 to whole patches: ours."""
    square: Tensor
    """[3, size, size], padded with -1: theirs."""
    mask: Tensor
    """bool [size, size]: pixels that are the image's."""


def picture(height: int, width: int, sizes: Sizes, seed: int) -> Picture:
    size = next(size for size in sorted(sizes.image_sizes) if size >= max(height, width))
    square = torch.full((3, size, size), -1.0)
    square[:, :height, :width] = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:height, :width] = True
    rows, cols = (-(-side // sizes.patch) * sizes.patch for side in (height, width))
    return Picture(square[:, :rows, :cols].contiguous(), square, mask)


def released_image_tokens(model: AriaForConditionalGeneration, pictures: list[Picture]) -> Tensor:
    """Visual tokens [M, H] in order: one image at a time, since a call takes one size."""
    return torch.cat(
        [
            model.model.get_image_features(p.square[None], pixel_mask=p.mask[None]).pooler_output.squeeze(0)
            for p in pictures
        ]
    )


def released_logits(
    model: AriaForConditionalGeneration,
    token_ids: Tensor,
    attention_mask: Tensor | None = None,
    pictures: list[Picture] | None = None,
) -> Tensor:
    embeddings = model.get_input_embeddings()(token_ids)
    if pictures:
        visual_tokens = released_image_tokens(model, pictures)
        is_image = (token_ids == model.config.image_token_index).unsqueeze(-1)
        assert is_image.sum() == visual_tokens.shape[0]
        embeddings = embeddings.masked_scatter(is_image, visual_tokens)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
    return model.lm_head(hidden)


def assert_same_gradients(ours: torch.nn.Module, theirs: AriaForConditionalGeneration, relative: float = 1e-3) -> None:
    """Every parameter's gradient equals the released one's, relative to its largest value.

    A key bias shifts all scores of a query alike: its true gradient is zero, and both sides hold rounding noise; hence
    the absolute part, 1e-6 of the largest gradient. The end-of-document token is the released embedding's padding
    index, whose row gets no gradient there; here it is a token like any other.
    """
    expected = by_our_names({name: p.grad for name, p in theirs.named_parameters()})
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        theirs_grad, grad = expected[name], parameter.grad
        if name.startswith("vision.post_norm"):  # nothing reads it
            assert grad is None
            assert theirs_grad is None
            continue
        if grad is None or theirs_grad is None:  # vision in a text batch
            assert theirs_grad is None, name
            assert grad is None or grad.abs().max() == 0, name
            continue
        if name == "embed.weight":
            grad[theirs.config.text_config.pad_token_id] = 0
        limit = relative * theirs_grad.abs().max().item() + 1e-6 * largest
        difference = (grad - theirs_grad).abs().max().item() if grad.numel() else 0.0
        assert difference <= limit, f"{name}: {difference:.3g} > {limit:.3g}"


def by_our_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a released model (names in memory) under our names."""
    ours = {published: name for name, published in _our_to_published(tensors).items()}
    # Shared experts of width 0 are tensors there, and nothing here.
    return {ours[canonical(name)]: tensor for name, tensor in tensors.items() if tensor is None or tensor.numel()}


def _our_to_published(tensors: Mapping[str, Any]) -> dict[str, str]:
    from aria_train.config import ModelConfig, VisionConfig
    from aria_train.model.hf import tensor_shapes

    layers = 1 + max(int(name.split("layers.")[1].split(".")[0]) for name in tensors if "layers." in name)
    names = tensor_shapes(ModelConfig(num_layers=layers, vision=VisionConfig(num_layers=layers)))
    return {name: published_name(name) for name in names}
