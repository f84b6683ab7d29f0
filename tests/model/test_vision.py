"""The vision encoder and projector, against transformers' on the same weights and for what packing promises."""

import pytest
import torch
from torch import Tensor, nn

from aria_train.batch import ImageBatch
from aria_train.config import ModelConfig, VisionConfig
from aria_train.errors import DataError
from aria_train.model import AriaModel
from aria_train.model.attention import cross_attention
from aria_train.model.projector import Projector
from aria_train.model.vision import VisionEncoder, images_to_batch
from tests.model.released import (
    Sizes,
    assert_same_gradients,
    by_our_names,
    picture,
    released_image_tokens,
    released_model,
)

SMALL = VisionConfig(
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    mlp_size=40,
    patch_size=2,
    position_grid=8,
    image_sizes={8: 3, 16: 6},
    min_image_size=4,
)


def encoder_and_projector(config: VisionConfig = SMALL, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"vision": VisionEncoder(config), "projector": Projector(config, hidden_size=32)})
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.3)
    return modules


def visual_tokens(modules: nn.ModuleDict, images: ImageBatch) -> Tensor:
    tokens: Tensor = modules["projector"](modules["vision"](images), images)
    return tokens


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        (Sizes(), [(8, 8), (16, 16), (7, 5), (9, 16), (16, 1), (3, 8)]),
        (Sizes(patch=3, image_sizes={12: 5}, vision_heads=2, vision_layers=1), [(12, 12), (12, 4), (1, 12)]),
        (Sizes(patch=1, image_sizes={4: 7, 20: 4}, vision_hidden=16, vision_heads=2), [(20, 20), (4, 3), (20, 19)]),
    ],
    ids=["two classes", "one class", "fewer queries for the larger class"],
)
def test_visual_tokens_and_gradients_equal_the_released_ones(sizes: Sizes, shapes: list[tuple[int, int]]):
    theirs = released_model(sizes)
    config = VisionConfig(
        hidden_size=sizes.vision_hidden,
        num_layers=sizes.vision_layers,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp,
        patch_size=sizes.patch,
        position_grid=max(sizes.image_sizes) // sizes.patch,
        image_sizes=sizes.image_sizes,
        min_image_size=1,
    )
    ours = nn.ModuleDict({"vision": VisionEncoder(config), "projector": Projector(config, sizes.hidden)})
    state = by_our_names(theirs.state_dict())
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})

    pictures = [picture(height, width, sizes, seed) for seed, (height, width) in enumerate(shapes)]
    expected = released_image_tokens(theirs, pictures)
    given = visual_tokens(ours, images_to_batch([p.whole_patches for p in pictures], config))
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=0)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    assert_same_gradients(ours, theirs)


def test_an_image_sees_only_itself():
    modules = encoder_and_projector()
    first, second, third = image(8, 6, 1), image(10, 16, 2), image(4, 8, 3)
    together = visual_tokens(modules, images_to_batch([first, second, third], SMALL)).split([3, 6, 3])
    for part, alone in zip(together, (first, second, third)):
        torch.testing.assert_close(part, visual_tokens(modules, images_to_batch([alone], SMALL)), atol=1e-5, rtol=0)

    changed = visual_tokens(modules, images_to_batch([first, image(10, 16, 4), third], SMALL)).split([3, 6, 3])
    assert torch.equal(changed[0], together[0])
    assert torch.equal(changed[2], together[2])
    assert not torch.allclose(changed[1], together[1])


def test_no_gradient_crosses_images():
    modules = encoder_and_projector()
    images = images_to_batch([image(8, 8, 1), image(8, 8, 2)], SMALL)
    images.patches.requires_grad_()
    visual_tokens(modules, images)[:3].square().sum().backward()
    assert images.patches.grad is not None
    assert images.patches.grad[:16].abs().min() > 0
    assert images.patches.grad[16:].abs().max() == 0


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_without_images_everything_runs_and_every_gradient_is_zero(recompute: str):
    modules = encoder_and_projector()
    modules["vision"].recompute = recompute
    tokens = visual_tokens(modules, ImageBatch.empty(SMALL.patch_size))
    assert tokens.shape == (0, 32)
    tokens.sum().backward()
    for name, parameter in modules.named_parameters():
        if "post_norm" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(recompute: str):
    images = images_to_batch([image(8, 8, 1), image(16, 6, 2)], SMALL)
    gradients = []
    for kind in ("none", recompute):
        modules = encoder_and_projector()
        modules["vision"].recompute = kind
        visual_tokens(modules, images).square().sum().backward()
        gradients.append([p.grad for p in modules.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_parameters_dtype_is_the_activations_dtype():
    modules = encoder_and_projector().to(torch.bfloat16)
    assert visual_tokens(modules, images_to_batch([image(8, 8)], SMALL)).dtype == torch.bfloat16


def test_images_pack_row_major_with_their_own_positions():
    picture = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6)
    batch = images_to_batch([picture, image(16, 4)], SMALL)
    assert batch.patches.shape == (6 + 16, 12)
    assert batch.starts.tolist() == [0, 6, 22]
    assert batch.num_queries == [3, 6]
    assert batch.patches[1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33, 50, 51, 56, 57]  # row 0, column 1
    assert batch.position_ids[:6].tolist() == [0, 2, 5, 32, 34, 37]
    assert images_to_batch([], SMALL).num_queries == []


@pytest.mark.parametrize("shape", [(3, 7, 8), (3, 8, 0), (1, 8, 8), (8, 8), (3, 18, 8)])
def test_an_image_that_cannot_be_is_named(shape: tuple[int, ...]):
    with pytest.raises(DataError, match="Image 1 "):
        images_to_batch([image(8, 8), torch.zeros(shape)], SMALL)


def test_full_size_counts():
    with torch.device("meta"):
        model = AriaModel(ModelConfig(vision=VisionConfig()))
    assert model.vision is not None
    assert model.projector is not None

    def count(module: nn.Module, frozen_only: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if not (frozen_only and p.requires_grad))

    assert count(model.vision) == 417_792_240
    assert count(model.vision, frozen_only=True) == count(model.vision.post_norm) == 2_304
    assert count(model.projector) == 20_427_136
    assert count(model) == 25_307_311_216


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the packed GPU kernel")
def test_cross_attention_on_the_gpu_equals_the_loop():
    torch.manual_seed(0)
    lengths, num_queries = [70, 1225, 3], [256, 128, 128]
    starts = torch.tensor([0, 70, 1295, 1298], dtype=torch.int32)
    q, k, v = (torch.randn(rows, 2, 72).bfloat16() for rows in (sum(num_queries), sum(lengths), sum(lengths)))
    expected = cross_attention(q.float(), k.float(), v.float(), num_queries, starts, 4900)
    given = cross_attention(q.cuda(), k.cuda(), v.cuda(), num_queries, starts.cuda(), 4900)
    torch.testing.assert_close(given.float().cpu(), expected, atol=2e-2, rtol=0)
