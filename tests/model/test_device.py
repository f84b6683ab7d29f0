"""The model on a device that is not the host, as a GPU is, whose tensors have no values here.

There, who mixes a tensor of the host into a computation meets an error, as does who copies one over in the midst of a
step, or asks for a value: each would make the host wait for a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.config import ModelConfig, OptimizerConfig, ParallelConfig, VisionConfig
from aria_train.model import AriaModel
from aria_train.model.recompute import Recompute
from aria_train.parallel.mesh import build_meshes
from aria_train.train.objective import Totals, objective
from aria_train.train.optimizer import build_optimizer, clip_gradients
from benchmarks import gpu
from tests.distributed import run_distributed

TOKENS, QUERIES, PATCHES = 96, 4, 16
CONFIG = ModelConfig(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, num_experts=8, top_k=2,
    expert_size=32, num_shared_experts=1, max_positions=128,
    vision=VisionConfig(
        hidden_size=48, num_layers=2, num_heads=2, mlp_size=64, patch_size=14, position_grid=4,
        image_sizes={56: QUERIES}, min_image_size=14,
    ),
)  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_stays_on_the_device(recompute: str) -> None:
    assert run_distributed(steps, 1, recompute) == [["text", "images", "nothing"]]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_step_with_sharded_weights_stays_on_the_device(recompute: str) -> None:
    """That of the benchmark on a GPU: two micro-batches, gradients added up and reduced, clipped, weights updated."""
    assert run_distributed(sharded_step, 1, recompute) == [{"unseen"}]


class Device(backend_registration._DummyBackendModule):
    """What PyTorch asks of a kind of device."""

    Stream = Event = current_stream = stream = mock.MagicMock()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def unseen() -> torch.device:
    """A device of a kind that this process alone knows from here on."""
    backend_registration._setup_privateuseone_for_python_backend("unseen", Device())
    return torch.device("unseen:0")


def sharded_step(recompute: Recompute) -> set[str]:
    """Returns the devices of the weights after a step."""
    device, size = unseen(), gpu.Size(2, 64, windows=4, micro_batch=2, recompute=recompute, tiny=True)
    meshes, mode = build_meshes(ParallelConfig(), device), FakeTensorMode(allow_non_fake_inputs=True)
    batches = [dataclasses.replace(b, **without_values(b, mode)) for b in gpu.batches_of(size)]
    models: list[AriaModel] = []
    known = {"build_meshes": lambda *_: meshes, "batches_of": lambda _: batches}
    with mode, mock.patch.multiple(gpu, **known, initialise=lambda model, *_, **__: models.append(model)):
        gpu.build_ours(size, device)()
    return {p.device.type for model in models for p in model.parameters()}


def without_values(batch: MicroBatch, mode: FakeTensorMode) -> dict[str, Tensor]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: mode.from_tensor(value) for name, value in fields.items() if isinstance(value, Tensor)}


def steps(recompute: Recompute) -> list[str]:
    """Of text, of text with images, and of a rank whose windows have run out."""
    device, done = unseen(), []
    with torch.device("meta"):
        model = AriaModel(CONFIG)
    with FakeTensorMode():
        for owner in model.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(owner, name, nn.Parameter(empty, parameter.requires_grad))
        model.set_recompute(recompute)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4))
        counts = torch.ones(CONFIG.num_layers, CONFIG.num_experts, dtype=torch.float64, device=device)
        for kind in ("text", "images", "nothing"):
            batch = batch_of(0 if kind == "nothing" else TOKENS, 3 if kind == "images" else 0, device)
            objective(model(batch), Totals(TOKENS, TOKENS, 3), counts, CONFIG).backward()
            parameters = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is not None and p.grad.device == device for p in parameters)
            clip_gradients(parameters, 1.0, 1)
            optimizer.step()
            optimizer.zero_grad()
            done.append(kind)
    return done


def batch_of(tokens: int, images: int, device: torch.device) -> MicroBatch:
    """Two documents, or none."""
    zeros = functools.partial(torch.zeros, dtype=torch.int64, device=device)
    starts = zeros(3 if tokens else 1, dtype=torch.int32)
    batch = MicroBatch(
        zeros(tokens), zeros(tokens), starts, tokens, zeros(2 if tokens else 0), target_positions=zeros(tokens),
        visual_positions=zeros(images * QUERIES),
    )  # fmt: skip
    if images:
        patches, spans = torch.zeros(images * PATCHES, 588, device=device), zeros(images + 1, dtype=torch.int32)
        batch.images = ImageBatch(patches, zeros(images * PATCHES), spans, [QUERIES] * images, query_starts=spans)
    return batch
