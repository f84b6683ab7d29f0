"""config.json of published Aria checkpoints, read in every variant and written as transformers 5.x does.

The variants differ in where they keep the RoPE base and the experts' width, and in `model_type`s. A value the model
cannot honour (another activation, biases, tied embeddings, scaled RoPE) is an error, never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch

from aria_train.config import ModelConfig, VisionConfig
from aria_train.errors import CheckpointError

_TEXT_DEFAULTS = {
    # transformers leaves out what equals these; `aria_moe_lm`, the first releases' name, has the same ones.
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_num_experts": 8,
    "moe_topk": 2,
    "moe_num_shared_experts": 2,
}
_IDEFICS3_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
}
SIGLIP_DEFAULTS = _IDEFICS3_DEFAULTS | {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16}
_VISION_DEFAULTS = {
    "idefics3_vision": _IDEFICS3_DEFAULTS,
    "aria_vision_model": SIGLIP_DEFAULTS,  # the first releases
    "siglip_vision_model": SIGLIP_DEFAULTS,
}
_TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
_MIN_IMAGE_SIZE = 336


def model_config_from_hf(hf_dir: str | Path) -> ModelConfig:
    """The architecture a Hugging Face folder describes: a whole Aria, or its decoder alone (`model_type: aria_text`).

    What published files do not say (balance-loss settings) has our defaults. Raises CheckpointError.
    """
    path = Path(hf_dir) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in ("aria", "aria_text", "aria_moe_lm"):
        raise CheckpointError(f"{path}: model_type {kind!r} is not Aria; allowed: aria, aria_text.")
    try:
        if kind != "aria":
            return ModelConfig(**_read_text(raw, path))
        _require(raw, {"tie_word_embeddings": False, "vision_feature_layer": -1}, path, "")
        fields = _read_text(raw.get("text_config") or {}, path)
        image_token = raw.get("image_token_index", raw.get("image_token_id", 9))
        return ModelConfig(**fields, image_token_id=image_token, vision=_read_vision(raw, path))
    except pydantic.ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in error.errors())
        raise CheckpointError(f"{path}: describes a model that cannot be built: {reasons}.") from None
    except (TypeError, AttributeError, LookupError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not an Aria configuration: {error!r}.") from None


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model: AriaForConditionalGeneration, or AriaTextForCausalLM where there is no vision."""
    # `rope_theta` is where transformers before 5 looks, `rope_parameters` where later ones do.
    text: dict[str, Any] = _TEXT_FIXED | {
        "model_type": "aria_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "moe_num_experts": config.num_experts,
        "moe_topk": config.top_k,
        "moe_num_shared_experts": config.num_shared_experts,
    }
    dtype_name = str(dtype).removeprefix("torch.")
    if config.vision is None:
        return {"architectures": ["AriaTextForCausalLM"], "dtype": dtype_name} | text
    vision = config.vision
    return {
        "architectures": ["AriaForConditionalGeneration"],
        "model_type": "aria",
        "dtype": dtype_name,
        "image_token_index": config.image_token_id,
        "initializer_range": config.init_std,
        "projector_patch_to_query_dict": {
            str((size // vision.patch_size) ** 2): queries for size, queries in vision.image_sizes.items()
        },
        "tie_word_embeddings": False,
        "vision_feature_layer": -1,
        "text_config": text,
        "vision_config": _VISION_FIXED
        | {
            "model_type": "idefics3_vision",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.mlp_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.position_grid * vision.patch_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
            "initializer_range": config.init_std,
        },
    }


def hf_preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json: how images were prepared, for transformers' AriaProcessor."""
    return {
        "image_processor_type": "AriaImageProcessor",
        "processor_class": "AriaProcessor",
        "max_image_size": max(vision.image_sizes),
        "min_image_size": vision.min_image_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "split_image": False,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file. A Hugging Face checkpoint is a folder with config.json."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return value


def _read_text(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our decoder keys."""
    _require(raw, _TEXT_FIXED, path, "text_config.")
    given = _TEXT_DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise CheckpointError(f"{path}: rope_type {rope_type!r} is not built; only the default RoPE is.")
    heads = given["num_attention_heads"]
    eos = given["eos_token_id"]
    experts = given["moe_num_experts"]
    return {
        "vocab_size": given["vocab_size"],
        "hidden_size": given["hidden_size"],
        "num_layers": given["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": given.get("num_key_value_heads", heads),
        "head_dim": given.get("head_dim", given["hidden_size"] // heads),
        "num_experts": experts,
        "top_k": given["moe_topk"],
        # The first releases' `intermediate_size`, 13568, is no width of anything in the model.
        "expert_size": given.get("moe_intermediate_size", given["intermediate_size"]),
        "num_shared_experts": given["moe_num_shared_experts"],
        "norm_eps": given["rms_norm_eps"],
        "rope_base": rope.get("rope_theta", given["rope_theta"]),
        "max_positions": given["max_position_embeddings"],
        "init_std": given["initializer_range"],
        "balance_group_size": math.gcd(experts, ModelConfig.model_fields["balance_group_size"].default),
        "pad_token_id": given["pad_token_id"],
        "bos_token_id": given["bos_token_id"],
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
    }


def _read_vision(raw: Mapping[str, Any], path: Path) -> VisionConfig:
    vision = raw.get("vision_config") or {}
    kind = vision.get("model_type", "idefics3_vision")
    if kind not in _VISION_DEFAULTS:
        allowed = ", ".join(_VISION_DEFAULTS)
        raise CheckpointError(f"{path}: vision_config.model_type {kind!r} is not built; allowed: {allowed}.")
    _require(vision, _VISION_FIXED, path, "vision_config.")
    given = _VISION_DEFAULTS[kind] | {key: value for key, value in vision.items() if value is not None}
    patch = given["patch_size"]
    queries = raw.get("projector_patch_to_query_dict") or {1225: 128, 4900: 256}
    image_sizes = {}
    for patches, count in queries.items():
        side = math.isqrt(int(patches))
        if side**2 != int(patches):
            raise CheckpointError(f"{path}: projector_patch_to_query_dict: {patches} patches make no square image.")
        image_sizes[side * patch] = int(count)
    return VisionConfig(
        hidden_size=given["hidden_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        mlp_size=given["intermediate_size"],
        patch_size=patch,
        position_grid=given["image_size"] // patch,
        norm_eps=given["layer_norm_eps"],
        image_sizes=image_sizes,
        min_image_size=min(_read_min_image_size(path.parent), *image_sizes),
    )


def _read_min_image_size(folder: Path) -> int:
    """From the image processor's own file, if the folder has it."""
    path = folder / "preprocessor_config.json"
    return read_json(path).get("min_image_size", _MIN_IMAGE_SIZE) if path.is_file() else _MIN_IMAGE_SIZE


def _require(raw: Mapping[str, Any], fixed: Mapping[str, Any], path: Path, section: str) -> None:
    """Refuses values that the model has built in otherwise."""
    for key, value in fixed.items():
        if raw.get(key) not in (None, value):
            raise CheckpointError(f"{path}: {section}{key} {raw[key]!r} is not built; Aria has {value!r}.")
