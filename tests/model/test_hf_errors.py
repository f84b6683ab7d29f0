"""Folders that are not what they should be: every one is refused by name, and nothing is left half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AriaConfig

from aria_train.config import ModelConfig, VisionConfig
from aria_train.errors import CheckpointError
from aria_train.model.hf import (
    load_pretrained,
    model_config_from_hf,
    read_tensors,
    save_pretrained,
    write_tensors,
)
from aria_train.model.hf.config import hf_config
from tests.model.small import SMALL, our_model

# ---------------------------------------------------------------------------------------------------------------------
# Accounting


def rewrite(folder: Path, source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


ROUTER = "language_model.model.layers.1.mlp.router.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(ROUTER), f"1 missing: {ROUTER}"),
        (lambda s: s.pop("multi_modal_projector.query"), "1 missing: multi_modal_projector.query"),
        (lambda s: s.update({"vision_tower.head.probe": torch.ones(2)}), "1 too many: vision_tower.head.probe"),
        (lambda s: s.update({"lm_head.weight": torch.ones(48, 32)}), "1 too many: (language_model.)?lm_head.weight"),
        (lambda s: s.update({ROUTER: torch.ones(7, 32)}), rf"of another shape: {ROUTER} is \[7, 32\], not \[8, 32\]"),
        (lambda s: s.update({ROUTER: s[ROUTER].T.contiguous()}), rf"{ROUTER} is \[32, 8\], not \[8, 32\]"),
        (lambda s: s.update({ROUTER: torch.ones(8, 32, dtype=torch.int8)}), f"{ROUTER} is I8; only"),
    ],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, Tensor]], object], message: str, published: Path, tmp_path: Path
):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(rewrite(tmp_path / "wrong", published, change))


def test_several_problems_are_told_at_once(published: Path, tmp_path: Path):
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".layers.1." in name]:
            state["extra." + name] = state.pop(name)

    folder = rewrite(tmp_path / "wrong", published, change)
    with pytest.raises(CheckpointError, match=r"(?s)\d+ missing: .* and \d+ more; \d+ too many: extra\."):
        read_tensors(folder, model_config_from_hf(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("projector.query"), "1 tensor.s. missing: projector.query"),
        (lambda s: s.update(surprise=torch.ones(2)), r"Tensor surprise \[2\] is not one of this model's"),
        (lambda s: s.update({"norm.weight": torch.ones(31)}), r"Tensor norm.weight is \[31\]; this model's is \[32\]"),
    ],
)
def test_an_export_that_does_not_add_up_leaves_nothing(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
):
    state = dict(our_model().state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        write_tensors(tmp_path / "out", SMALL, state.items(), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_given_twice_is_refused(tmp_path: Path):
    pairs = list(our_model().state_dict().items())
    with pytest.raises(CheckpointError, match=r"embed\.weight was given twice"):
        write_tensors(tmp_path / "out", SMALL, [*pairs[:3], pairs[0]], torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(error: type[BaseException], tmp_path: Path):
    def stream():
        yield from list(our_model().state_dict().items())[:5]
        raise error

    with pytest.raises(error):
        write_tensors(tmp_path / "deep/out", SMALL, stream(), torch.float32)
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_existing_folder_is_left_alone_unless_empty(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        save_pretrained(our_model(), tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        save_pretrained(our_model(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save_pretrained(our_model(), tmp_path / "empty")
    assert load_pretrained(tmp_path / "empty").config == SMALL


# ---------------------------------------------------------------------------------------------------------------------
# Damaged folders


def damaged(published: Path, folder: Path, data: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-10],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        lambda data: (2).to_bytes(8, "little") + b"[]",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
    ids=["cut", "no header", "empty", "huge header", "bad header", "overlap", "a list", "an LFS pointer"],
)
def test_a_damaged_file_is_named(spoil: Callable[[bytes], bytes], published: Path, tmp_path: Path):
    folder = damaged(published, tmp_path / "bad", spoil((published / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load_pretrained(folder)


def test_what_is_not_there_is_named(published: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"no \.safetensors files here"):
        load_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {ROUTER: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: no such file"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {ROUTER: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    (tmp_path / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"do not have: a\.weight"):
        load_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def with_config(folder: Path, published: Path, *edits: tuple[str, object]) -> Path:
    """The published config.json with edits: dotted key -> value."""
    config = json.loads((published / "config.json").read_text())
    for key, value in edits:
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llava", "model_type 'llava' is not Aria"),
        ("tie_word_embeddings", True, "tie_word_embeddings True is not built"),
        ("vision_feature_layer", -2, "vision_feature_layer -2 is not built"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act 'gelu' is not built; Aria has 'silu'"),
        ("text_config.attention_bias", True, "attention_bias True"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not built"),
        ("text_config.moe_topk", 9, "top_k 9 exceeds num_experts 8"),
        ("text_config.hidden_size", "many", "cannot be built|not an Aria configuration"),
        ("vision_config.model_type", "clip_vision_model", "vision_config.model_type 'clip_vision_model'"),
        ("vision_config.hidden_act", "quick_gelu", "vision_config.hidden_act 'quick_gelu'"),
        ("vision_config.patch_size", 0, "not an Aria configuration|cannot be built"),
        ("projector_patch_to_query_dict", {"15": 3}, "15 patches make no square image"),
        ("vision_config", "none", "not an Aria configuration"),
    ],
)
def test_a_configuration_that_is_not_built_is_refused(
    key: str, value: object, message: str, published: Path, tmp_path: Path
):
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf(with_config(tmp_path, published, (key, value)))


def test_keys_that_publishers_leave_out_have_transformers_defaults(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "aria", "text_config": {}, "vision_config": {}}))
    reference = AriaConfig()
    ours = model_config_from_hf(tmp_path)
    text, vision = reference.text_config, reference.vision_config
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (
        text.vocab_size,
        text.hidden_size,
        text.num_hidden_layers,
    )
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
    )
    assert (ours.num_experts, ours.top_k, ours.expert_size) == (
        text.moe_num_experts,
        text.moe_topk,
        text.intermediate_size,
    )
    assert (ours.rope_base, ours.max_positions) == (
        text.rope_parameters["rope_theta"],
        text.max_position_embeddings,
    )
    assert ours.vision is not None
    assert (ours.vision.hidden_size, ours.vision.mlp_size, ours.vision.num_layers, ours.vision.num_heads) == (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
    )
    assert ours.vision.position_grid == vision.image_size // vision.patch_size


def test_smallest_image_size_survives_the_round_trip(tmp_path: Path):
    save_pretrained(our_model(), tmp_path / "out")
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["min_image_size"] == 4
    (tmp_path / "out/preprocessor_config.json").unlink()
    restored = model_config_from_hf(tmp_path / "out").vision
    assert restored is not None
    assert restored.min_image_size == 8  # 336, or the smallest class where that is smaller


def test_the_full_size_configuration_survives_the_round_trip(tmp_path: Path):
    full = ModelConfig(vision=VisionConfig())
    (tmp_path / "config.json").write_text(json.dumps(hf_config(full, torch.bfloat16)))
    assert model_config_from_hf(tmp_path) == full
