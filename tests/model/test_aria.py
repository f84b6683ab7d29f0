"""The model at full size, on the meta device: every size of the paper and the released weights, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.config import ModelConfig, RunConfig, VisionConfig, load_config
from aria_train.model import AriaModel
from aria_train.model.loss import _tile_shape

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAYERS, HIDDEN, VOCABULARY, EXPERTS, WIDTH = 28, 2560, 100_352, 64, 1664


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(CONFIGS / "stage1_lang.yaml")


@pytest.fixture(scope="module")
def shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AriaModel(config.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count(shapes: dict[str, tuple[int, ...]], part: str = "") -> int:
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(part))


def test_the_decoder_has_exactly_24_869_091_840_parameters(shapes: dict[str, tuple[int, ...]]) -> None:
    assert count(shapes) == 24_869_091_840


def test_every_part_has_its_size(shapes: dict[str, tuple[int, ...]]) -> None:
    assert count(shapes, "embed.") == count(shapes, "head.") == 256_901_120
    assert count(shapes, "norm.") == 2_560
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        assert count(shapes, at) == 869_831_680
        assert count(shapes, at + "attention.") == 26_214_400
        assert count(shapes, at + "moe.router.") == 163_840
        assert count(shapes, at + "moe.experts.") == 817_889_280
        assert count(shapes, at + "moe.shared.") == 25_559_040
        assert count(shapes, at + "attention_norm.") + count(shapes, at + "moe_norm.") == 5_120


def test_every_tensor_has_its_name_and_shape(shapes: dict[str, tuple[int, ...]]) -> None:
    expected: dict[str, tuple[int, ...]] = {
        "embed.weight": (VOCABULARY, HIDDEN),
        "head.weight": (VOCABULARY, HIDDEN),
        "norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        expected |= {
            at + "attention_norm.weight": (HIDDEN,),
            at + "attention.q.weight": (20 * 128, HIDDEN),
            at + "attention.k.weight": (20 * 128, HIDDEN),
            at + "attention.v.weight": (20 * 128, HIDDEN),
            at + "attention.o.weight": (HIDDEN, 20 * 128),
            at + "moe_norm.weight": (HIDDEN,),
            at + "moe.router.weight": (EXPERTS, HIDDEN),
            at + "moe.experts.gate_up": (EXPERTS, HIDDEN, 2 * WIDTH),
            at + "moe.experts.down": (EXPERTS, WIDTH, HIDDEN),
            at + "moe.shared.gate.weight": (3328, HIDDEN),
            at + "moe.shared.up.weight": (3328, HIDDEN),
            at + "moe.shared.down.weight": (HIDDEN, 3328),
        }
    # No biases, no tied embeddings, nothing else.
    assert shapes == expected


def test_what_a_token_activates(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    routed = count(shapes, "layers.") - sum(
        count(shapes, f"layers.{n}.moe.experts.") * (EXPERTS - config.model.top_k) // EXPERTS for n in range(LAYERS)
    )
    assert routed + count(shapes, "norm.") == 3_601_349_120
    assert routed + count(shapes, "norm.") + count(shapes, "head.") == 3_858_250_240


def test_the_configuration_is_the_papers(config: RunConfig) -> None:
    model = config.model
    assert (model.vocab_size, model.hidden_size, model.num_layers) == (VOCABULARY, HIDDEN, LAYERS)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (20, 20, 128)
    assert (model.num_experts, model.top_k, model.expert_size) == (64, 6, 1664)
    assert model.num_shared_experts == 2
    assert model.norm_eps == 1e-6
    assert model.rope_base == 100_000
    assert model.max_positions == 65_536
    assert model.init_std == 0.02
    assert model.balance_group_size == 8
    assert (model.image_token_id, model.pad_token_id, model.bos_token_id, model.eos_token_id) == (9, 2, 1, 2)
    assert model.vision is None
    assert config.train.context_length == 8192
    assert config.train.max_tokens == 6_400_000_000_000
    assert config.parallel.expert_parallel_size == 8


def test_with_vision_and_projector_it_has_25_307_311_216(config: RunConfig) -> None:
    """2,304 of them are the encoder's last norm, which is kept for the released files and never used."""
    with torch.device("meta"):
        model = AriaModel(load_config(CONFIGS / "stage2_mm.yaml").model)
    assert model.vision is not None
    assert model.projector is not None
    tensors = model.state_dict()
    sizes = {
        part: sum(t.numel() for n, t in tensors.items() if n.startswith(part)) for part in ("vision.", "projector.")
    }
    assert sizes == {"vision.": 417_792_240, "projector.": 20_427_136}
    assert sum(t.numel() for t in tensors.values()) == 25_307_311_216


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_device_has_to_wait_for_the_host_in_a_step(recompute: str) -> None:
    """Forward and backward, with images, the way a GPU goes. Meta tensors have no values; who asks for one fails."""
    with torch.device("meta"):
        model = AriaModel(ModelConfig(num_layers=2, vision=VisionConfig(num_layers=2))).bfloat16()
        model.set_recompute(recompute)
        batch = meta_batch(tokens=8192, num_images=3, queries=256, patches=4900)
    output = model(batch)
    (output.loss_sum + output.router.z_sum.sum() + output.router.prob_sums.sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_modules_return_tensors_and_tuples_of_them() -> None:
    """FSDP2 looks for gradients there; in dataclasses from PyTorch 2.12 on; a model of one unit got none before."""
    with torch.device("meta"):
        model = AriaModel(ModelConfig(num_layers=2, vision=VisionConfig(num_layers=2))).bfloat16()
        batch = meta_batch(tokens=8192, num_images=3, queries=256, patches=4900)
    returned: dict[str, set[type]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: returned.update({name: set(map(type, tree_leaves(output)))})
        )
    model(batch)
    assert {"", "layers.1", "layers.1.moe.experts", "vision", "projector"} <= returned.keys()
    assert {name: kinds for name, kinds in returned.items() if kinds != {torch.Tensor}} == {}


def test_a_wait_for_the_device_would_be_noticed() -> None:
    """Without their positions the model has to look where images stand: the test above would fail for it."""
    with torch.device("meta"):
        model = AriaModel(ModelConfig(num_layers=1, vision=VisionConfig(num_layers=1))).bfloat16()
        batch = meta_batch(tokens=8192, num_images=3, queries=256, patches=4900)
    batch.visual_positions = None
    with pytest.raises(RuntimeError, match="nonzero"):
        model(batch)


def meta_batch(tokens: int, num_images: int, queries: int, patches: int) -> MicroBatch:
    """Four documents, and images of the largest size."""
    ids, sources = torch.zeros(tokens, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    batch = MicroBatch(ids, ids, torch.zeros(5, dtype=torch.int32), tokens, sources, target_positions=ids)
    pixels, where = torch.zeros(num_images * patches, 588), torch.zeros(num_images * patches, dtype=torch.int64)
    batch.images = ImageBatch(pixels, where, torch.zeros(num_images + 1, dtype=torch.int32), [queries] * num_images)
    batch.visual_positions = ids[: num_images * queries]
    return batch


@pytest.mark.parametrize("positions", [1, 7931, 8192, 65536])
@pytest.mark.parametrize(("hidden", "vocabulary"), [(HIDDEN, VOCABULARY), (64, 1024), (8192, 256_000), (128, 2**26)])
def test_tiles_of_the_loss_take_no_more_memory_than_the_gradient(hidden: int, vocabulary: int, positions: int) -> None:
    """On a GPU: bf16 tiles of a chunk beside the float32 gradient of the head; a tile in float32 is 128 MiB."""
    with torch.device("meta"):
        rows, columns = _tile_shape(torch.empty(positions, hidden), torch.empty(vocabulary, hidden))
    assert rows * columns <= max(2**25, rows)
    assert rows * vocabulary * 2 <= max(vocabulary * hidden * 4, 2**26)
    assert rows % 128 == columns % 128 == 0
