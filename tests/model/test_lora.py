"""Adapters: only they move, they are saved alone and come back, and merging changes nothing about what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from aria_train.cli import main
from aria_train.config import LoraConfig, RunConfig
from aria_train.errors import CheckpointError, ConfigError, UserError
from aria_train.eval.loading import load_model
from aria_train.model import AriaModel
from aria_train.model.hf import load_pretrained
from aria_train.model.lora import Adapters, add_adapters, from_peft, is_adapter, peft_name, to_peft
from aria_train.parallel import checkpoint
from aria_train.parallel.job import orderly_end
from aria_train.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.model.released import Sizes, released_model
from tests.stages.recipe import VISION, conversations, make_sample, saved_tensors, write_samples, write_text
from tests.tiny import MODEL, read_steps, tiny_config, with_values

LORA = {"rank": 4, "alpha": 6.0}


def train(config: RunConfig) -> None:
    with orderly_end():
        Trainer(config).run()


def lora_config(folder: Path, base: str, run: str = "lora", **sections: dict[str, Any]) -> RunConfig:
    """Adapters on a base for 4 steps of conversations, some with images."""
    chats = folder / "chats"
    if not chats.exists():
        conversations(chats, count=24)
    source = {"name": "chat", "path": str(chats)}
    config = tiny_config(
        folder / run,
        [source],
        model={"vision": VISION},
        # As eps in `tiny_config`, at ten times its learning rate: else the rounding of a vanishing gradient shows.
        optimizer={"lr": 2e-2, "eps": 1e-5},
        schedule={"warmup_tokens": 0},
        train={"lora": LORA, "max_steps": 4, "global_batch_size": 4, "context_length": 48},
        checkpoint={"init_from": base, "interval_steps": 2, "keep_last": 3},
    )
    return with_values(config, **sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, to adapt."""
    folder = tmp_path_factory.mktemp("base")
    source = {"name": "text", "path": write_text(folder / "text", 60, 10, 40)}
    config = tiny_config(folder / "run", [source], model={"vision": VISION}, train={"max_steps": 1})
    train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of adapters on one process."""
    config = lora_config(tmp_path_factory.mktemp("lora"), str(base))
    train(config)
    return config


def merged(run_dir: Path | str) -> AriaModel:
    """The whole model of a run's newest checkpoint."""
    folder = checkpoint.resolve(str(run_dir))
    config = RunConfig.model_validate(checkpoint.read_manifest(folder).config)
    return load_model(folder, config, torch.device("cpu")).eval()


def adapted(config: RunConfig) -> AriaModel:
    """The same with the adapters beside the weights, as in training."""
    with torch.device("meta"):
        model = AriaModel(config.model)
    assert config.train.lora is not None
    add_adapters(model, config.train.lora, torch.float32)
    model.to_empty(device="cpu")
    stored = saved_tensors(Path(config.train.run_dir)) | base_tensors(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored[f"model.{name}"])
    return model.eval()


def base_tensors(config: RunConfig) -> dict[str, Tensor]:
    manifest = checkpoint.read_manifest(checkpoint.resolve(config.train.run_dir))
    path = RunConfig.model_validate(manifest.config).checkpoint.init_from
    assert path is not None
    return {n: t for n, t in saved_tensors(Path(path)).items() if n.startswith("model.")}


def some_tokens() -> Tensor:
    return torch.randint(42, MODEL["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_only_adapters_move_and_they_are_saved_alone(trained: RunConfig, base: Path) -> None:
    stored = saved_tensors(Path(trained.train.run_dir))
    weights = [name for name in stored if name.startswith("model.")]
    # Two layers, of four projections and two expert weights, an A and a B each.
    assert len(weights) == 2 * (4 + 2) * 2
    assert all(is_adapter(name) for name in weights)
    assert all(name.removeprefix("optimizer.").rpartition(".")[0].endswith(("lora_A", "lora_B"))
               for name in stored if name.startswith("optimizer."))  # fmt: skip
    assert all(stored[name].abs().sum() > 0 for name in weights)
    before, after = dict(merged(base).named_parameters()), dict(merged(trained.train.run_dir).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"layers.{layer}.{weight}"
        for layer in range(2)
        for weight in (
            *(f"attention.{name}.weight" for name in "qkvo"),
            "moe.experts.gate_up",
            "moe.experts.down",
        )
    }


def test_adapters_learn(trained: RunConfig) -> None:
    losses = [line["loss"] for line in read_steps(trained.train.run_dir)]
    assert losses[-1] < losses[0]


def test_adapters_change_nothing_at_first(base: Path, tmp_path: Path) -> None:
    config = lora_config(tmp_path, str(base), train={"max_steps": 1}, optimizer={"lr": 1e-30})
    train(config)
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(adapted(config).logits(tokens), merged(base).logits(tokens))


def test_resumed_run_is_the_uninterrupted_one(trained: RunConfig, base: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(trained.train.run_dir).parent / "chats", tmp_path / "chats")
    config = lora_config(tmp_path, str(base))
    train(with_values(config, train={"max_steps": 2}))
    train(config)
    ours, theirs = saved_tensors(tmp_path / "lora"), saved_tensors(Path(trained.train.run_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_steps(tmp_path / "lora") == read_steps(trained.train.run_dir)


def train_on_ranks(config: RunConfig) -> None:
    Trainer(config).run()
    dist.barrier()


@pytest.mark.distributed
def test_two_expert_ranks_save_the_adapters_of_one(trained: RunConfig, base: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(trained.train.run_dir).parent / "chats", tmp_path / "chats")
    config = lora_config(tmp_path, str(base), parallel={"expert_parallel_size": 2})
    run_distributed(train_on_ranks, 2, config)
    ours, theirs = saved_tensors(tmp_path / "lora"), saved_tensors(Path(trained.train.run_dir))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    files = [load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
             for folder in (tmp_path / "lora", trained.train.run_dir)]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[1].items():
        torch.testing.assert_close(files[0][name], tensor, rtol=1e-5, atol=1e-5)


def test_frozen_weights_in_bfloat16_train_too(base: Path, tmp_path: Path) -> None:
    config = lora_config(tmp_path, str(base), train={"precision": "bf16", "lora": {"rank": 8, "alpha": 8.0}})
    train(config)
    losses = [line["loss"] for line in read_steps(config.train.run_dir)]
    assert losses[-1] < losses[0]


@pytest.mark.distributed
def test_frozen_experts_stay_under_expert_parallelism(base: Path, tmp_path: Path) -> None:
    config = lora_config(
        tmp_path,
        str(base),
        parallel={"expert_parallel_size": 2},
        train={"lora": None, "freeze": ["decoder"]},
        checkpoint={"init_from": str(base)},
    )
    run_distributed(train_on_ranks, 2, config)
    before, after = saved_tensors(base), saved_tensors(tmp_path / "lora")
    changed = {n for n in before if n.startswith("model.") and not torch.equal(before[n], after[n])}
    assert changed
    assert all(name.startswith(("model.vision.", "model.projector.")) for name in changed)


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def test_merged_export_of_an_imported_model_says_what_the_adapters_say(tmp_path: Path) -> None:
    released_model(Sizes(vocab=MODEL["vocab_size"])).save_pretrained(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "imported")]) == 0
    model = RunConfig.model_validate(checkpoint.read_manifest(tmp_path / "imported").config).model
    samples = [make_sample([(5, False), (6, True)], seed=n) for n in range(30)]
    write_samples(tmp_path / "chats", samples, "chat")
    config = lora_config(tmp_path, str(tmp_path / "imported"), model=model.model_dump(mode="json"))
    train(config)
    assert main(["export", config.train.run_dir, str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    tokens = some_tokens()
    with torch.no_grad():
        wanted = adapted(config).logits(tokens)
        found = load_pretrained(tmp_path / "out").eval().logits(tokens)
        untouched = load_pretrained(tmp_path / "hf").eval().logits(tokens)
        held = merged(config.train.run_dir).logits(tokens)
    assert (wanted - untouched).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(held, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["layers.0.attention.q.weight", "layers.1.moe.experts.gate_up"])
def test_merging_by_boxes_is_merging(weight: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stem = weight.removesuffix("weight") if weight.endswith("weight") else f"{weight}_"
    shapes = ((2, 6), (8, 2)) if weight.endswith("weight") else ((3, 6, 2), (3, 2, 8))
    a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    adapters = Adapters(LoraConfig(rank=2, alpha=3.0), {f"{stem}lora_A": a, f"{stem}lora_B": b})
    whole = 1.5 * (b @ a) if weight.endswith("weight") else 1.5 * torch.einsum("eir,ero->eio", a, b)
    assert adapters.adapts(weight)
    assert not adapters.adapts("layers.0.moe.router.weight")
    torch.testing.assert_close(adapters.delta(weight, (0,) * whole.ndim, tuple(whole.shape)), whole)
    corner = tuple(size // 2 for size in whole.shape)
    box = tuple(slice(start, None) for start in corner)
    torch.testing.assert_close(adapters.delta(weight, corner, tuple(whole[box].shape)), whole[box])


def test_a_full_run_starts_from_merged_adapters(trained: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(Path(trained.train.run_dir).parent / "chats", tmp_path / "chats")
    config = lora_config(tmp_path, trained.train.run_dir, train={"lora": None, "max_steps": 1}, optimizer={"lr": 1e-30})
    train(config)
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tmp_path / "lora").logits(tokens), merged(trained.train.run_dir).logits(tokens)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_names_are_pefts() -> None:
    names = {
        "layers.3.attention.q.lora_A": "layers.3.self_attn.q_proj.lora_A.weight",
        "layers.3.moe.experts.gate_up_lora_B": "layers.3.mlp.experts.base_layer.lora_B.weight",
        "layers.3.moe.experts.down_lora_A": "layers.3.mlp.experts.lora_A.weight",
    }
    for ours, theirs in names.items():
        assert peft_name(ours, has_vision=True) == f"base_model.model.model.language_model.{theirs}"
        assert peft_name(ours, has_vision=False) == f"base_model.model.model.{theirs}"


def test_layouts_are_pefts() -> None:
    """PEFT merges experts by einsum("o r e, e r i -> e i o") over reshaped matrices."""
    experts, inner, outer, rank = 3, 4, 6, 2
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(experts, inner, rank, generator=generator)
    b = torch.randn(experts, rank, outer, generator=generator)
    stem = "layers.0.moe.experts.down_"
    adapters = Adapters(LoraConfig(rank=rank), {f"{stem}lora_A": a, f"{stem}lora_B": b})
    files = to_peft(adapters, has_vision=True)
    matrix_a, matrix_b = (files[peft_name(f"{stem}lora_{letter}", True)] for letter in "AB")
    delta = torch.einsum("ore,eri->eio", matrix_b.reshape(outer, rank, experts), matrix_a.reshape(experts, rank, inner))
    torch.testing.assert_close(delta, a @ b)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapters.tensors.items()}
    back = from_peft(files, shapes, has_vision=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in adapters.tensors.items())


def test_adapters_alone_are_taken_up_again(trained: RunConfig, base: Path, tmp_path: Path) -> None:
    folder = Path(trained.train.run_dir) / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 6.0)
    shutil.copytree(Path(trained.train.run_dir).parent / "chats", tmp_path / "chats")
    config = lora_config(
        tmp_path,
        str(base),
        train={"lora": {**LORA, "init_from": str(folder)}, "max_steps": 1},
        optimizer={"lr": 1e-30},
    )
    train(config)
    ours, theirs = saved_tensors(tmp_path / "lora"), saved_tensors(Path(trained.train.run_dir))
    names = [name for name in theirs if name.startswith("model.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_peft_says_what_we_say(trained: RunConfig, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    assert main(["export", str(base), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(Path(trained.train.run_dir) / "adapter")).eval()
    tokens = some_tokens()
    with torch.no_grad():
        wanted = theirs(input_ids=tokens).logits
        torch.testing.assert_close(merged(trained.train.run_dir).logits(tokens), wanted, rtol=1e-4, atol=1e-4)


def test_run_directories_may_move_together(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "before" / "base")
    config = lora_config(tmp_path / "before", str(tmp_path / "before" / "base"), train={"max_steps": 1})
    train(config)
    (tmp_path / "before").rename(tmp_path / "after")
    assert merged(tmp_path / "after" / "lora")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_base_that_is_another_now_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = lora_config(tmp_path, str(tmp_path / "base"), train={"max_steps": 1})
    train(config)
    source = {"name": "text", "path": write_text(tmp_path / "text", 60, 10, 40)}
    shutil.rmtree(tmp_path / "base")
    other = {"max_steps": 1, "seed": 8}
    train(tiny_config(tmp_path / "base", [source], model={"vision": VISION}, train=other))
    with pytest.raises(CheckpointError, match="is not there or is another checkpoint now"):
        merged(tmp_path / "lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": {"init_from": None}}, "checkpoint.init_from must name its checkpoint"),
        ({"train": {"lora": {**LORA, "init_from": "nowhere"}}}, "nowhere/adapter_model.safetensors cannot be read"),
    ],
)
def test_mistakes(base: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(lora_config(tmp_path, str(base), **settings))


def test_adapters_of_another_rank_are_refused(trained: RunConfig, base: Path, tmp_path: Path) -> None:
    folder = Path(trained.train.run_dir) / "adapter"
    with pytest.raises(CheckpointError, match="does not hold the adapters of this model"):
        train(lora_config(tmp_path, str(base), train={"lora": {"rank": 8, "init_from": str(folder)}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"freeze": ["vision"]}}, "train.lora freezes all weights"),
        ({"train": {"lora": {"rank": 6}}}, "train.lora.rank 6 must be a multiple of 4"),
        ({"train": {"lora": {"targets": []}}}, "at least 1 item"),
        ({"checkpoint": {"init_fresh": ["projector"]}}, "as it is"),
    ],
)
def test_settings_that_contradict_adapters(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        lora_config(tmp_path, "base", **settings)
