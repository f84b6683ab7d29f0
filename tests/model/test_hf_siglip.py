"""Initial vision weights from SigLIP, against transformers' SigLIP itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig, SiglipVisionModel

from aria_train.config import VisionConfig
from aria_train.errors import CheckpointError
from aria_train.model.hf import read_siglip
from aria_train.model.hf.siglip import resize_positions
from aria_train.model.vision import VisionEncoder, images_to_batch
from tests.model.released import randomise

SIGLIP = SiglipVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=12,
    patch_size=2,
)
OURS = VisionConfig(
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    mlp_size=40,
    patch_size=2,
    position_grid=6,
    image_sizes={12: 4},
    min_image_size=2,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves of a SigLIP, as transformers saves it."""
    text = SiglipTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, bos_token_id=1
    )
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=SIGLIP.to_dict()))
    randomise(model, seed=0)
    folder = tmp_path_factory.mktemp("siglip") / "whole"
    model.save_pretrained(folder)
    return folder


def encoder(folder: Path, config: VisionConfig = OURS) -> VisionEncoder:
    model = VisionEncoder(config)
    model.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in read_siglip(folder, config)})
    return model


def test_features_equal_siglips_at_its_own_size(whole: Path):
    theirs = SiglipModel.from_pretrained(whole).vision_model
    pixels = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-1].squeeze(0)
    torch.testing.assert_close(encoder(whole)(images_to_batch([pixels[0]], OURS)), expected, atol=1e-5, rtol=0)


def test_every_layout_gives_the_same_weights(whole: Path, tmp_path: Path):
    expected = encoder(whole).state_dict()
    assert torch.equal(expected["post_norm.weight"], torch.zeros(24))
    vision_only = SiglipVisionModel.from_pretrained(whole)
    vision_only.save_pretrained(tmp_path / "vision")
    state = load_file(tmp_path / "vision/model.safetensors")
    for prefix in ("", "vision_model.", "vision_tower.vision_model."):
        folder = tmp_path / f"prefix_{prefix}"
        folder.mkdir()
        renamed = {prefix + re.sub(r"^(vision_model\.)?", "", name): tensor for name, tensor in state.items()}
        save_file(renamed, folder / "model.safetensors")
        given = encoder(folder).state_dict()
        assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_what_is_not_used_is_listed(whole: Path):
    not_used = read_siglip(whole, OURS).not_used
    assert "vision_model.head.probe" in not_used
    assert "vision_model.post_layernorm.weight" in not_used
    assert "logit_scale" in not_used
    assert any(name.startswith("text_model.") for name in not_used)
    assert not any("encoder.layers" in name for name in not_used if name.startswith("vision_model."))


def test_positions_are_resized_to_our_grid(whole: Path):
    config = OURS.model_copy(update={"position_grid": 10, "image_sizes": {20: 4}})
    positions = dict(read_siglip(whole, config))["vision.position_embedding.weight"]
    expected = SiglipModel.from_pretrained(whole).vision_model.embeddings.interpolate_pos_encoding(
        torch.zeros(1, 24), height=20, width=20
    )
    torch.testing.assert_close(positions, expected.squeeze(0), atol=1e-6, rtol=0)


def test_resizing_keeps_constants_and_the_order_of_rows():
    assert torch.allclose(resize_positions(torch.full((27 * 27, 3), 0.5), 70), torch.tensor(0.5))
    rows = torch.arange(27.0).repeat_interleave(27)[:, None].bfloat16()
    resized = resize_positions(rows, 70).view(70, 70)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized[:, 0], resized[:, -1])
    assert (resized[1:, 0] >= resized[:-1, 0]).all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("vision_model.encoder.layers.1.mlp.fc1.bias", None, "1 missing: encoder.layers.1.mlp.fc1.bias"),
        ("vision_model.surprise", torch.ones(1), "1 unknown: vision_model.surprise"),
        (
            "vision_model.embeddings.patch_embedding.weight",
            torch.ones(24, 3, 4, 4),
            r"patch_embedding.weight is \[24, 3, 4, 4\], not \[24, 3, 2, 2\]",
        ),
        ("vision_model.embeddings.position_embedding.weight", torch.ones(35, 24), r"\[35, 24\], not \[36, 24\]"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, tensor: torch.Tensor | None, message: str, whole: Path, tmp_path: Path):
    state = load_file(whole / "model.safetensors")
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_siglip(tmp_path, OURS)


def test_another_number_of_heads_is_refused(whole: Path, tmp_path: Path):
    save_file(load_file(whole / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 4}}))
    with pytest.raises(CheckpointError, match=r"4 attention heads, but model\.vision\.num_heads is 3"):
        read_siglip(tmp_path, OURS)
