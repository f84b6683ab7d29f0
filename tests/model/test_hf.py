"""Hugging Face weights in and out: parity with transformers on the same weights, every naming, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from aria_train.config import ModelConfig
from aria_train.model.hf import (
    files,
    load_pretrained,
    open_sink,
    save_pretrained,
    tensors,
)
from tests.model.released import (
    Sizes,
    assert_same_gradients,
    by_our_names,
    picture,
    released_logits,
    released_model,
)
from tests.model.small import SMALL, TEXT_ONLY, our_model, same_state

# ---------------------------------------------------------------------------------------------------------------------
# Parity


def token_rows(images: list[list[int]], lengths: list[int], vocab: int) -> Tensor:
    """Random text, right-padded with the end-of-document token, with runs of image tokens (their lengths per row)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, vocab, (len(lengths), max(lengths)), generator=generator)
    for row, runs, length in zip(rows, images, lengths, strict=True):
        row[length:] = 2
        row[length // 2] = 2
        place = 1
        for run in runs:
            row[place : place + run] = 9
            place += run + 1
    return rows


REAL_IMAGES = Sizes(patch=14, image_sizes={490: 128, 980: 256}, vision_hidden=16, vision_heads=2, vision_layers=1)


@pytest.mark.parametrize(
    ("sizes", "shapes", "lengths"),
    [
        (Sizes(), [[], []], [30, 17]),
        (Sizes(), [[(8, 8), (16, 16)], [(7, 5), (9, 16)]], [40, 26]),
        (
            Sizes(kv_heads=2, head_dim=16, shared=1, experts=6, top_k=3, patch=3, image_sizes={12: 5}, rope_base=5e6),
            [[(12, 12)], [], [(12, 4), (1, 12)]],
            [20, 9, 33],
        ),
        (Sizes(shared=0, layers=1, heads=2, kv_heads=1, image_sizes={8: 3}), [[(8, 6)]], [12]),
        (REAL_IMAGES, [[(490, 490), (980, 600)], [(336, 490)]], [420, 200]),
    ],
    ids=["text", "two classes", "grouped heads", "no shared experts", "real image sizes"],
)
def test_logits_and_gradients_equal_the_released_ones(
    sizes: Sizes, shapes: list[list[tuple[int, int]]], lengths: list[int], tmp_path: Path
):
    theirs = released_model(sizes)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert same_state(by_our_names(theirs.state_dict()), dict(ours.state_dict()))

    pictures = [[picture(h, w, sizes, seed=h + w) for h, w in row] for row in shapes]
    runs = [[sizes.image_sizes[p.square.shape[-1]] for p in row] for row in pictures]
    token_ids = token_rows(runs, lengths, sizes.vocab)
    is_text = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    in_order = [p for row in pictures for p in row]

    expected = released_logits(theirs, token_ids, is_text.long(), in_order)[is_text]
    given = ours.logits(token_ids, [p.whole_patches for p in in_order])[is_text]
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    assert_same_gradients(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Out, and back in transformers


def test_export_is_bitwise_in_transformers(tmp_path: Path):
    ours = our_model()
    save_pretrained(ours, tmp_path / "out")
    theirs, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert same_state(by_our_names(theirs.state_dict()), dict(ours.state_dict()))
    again = load_pretrained(tmp_path / "out")
    assert again.config == SMALL
    assert same_state(dict(again.state_dict()), dict(ours.state_dict()))


def test_import_then_export_gives_back_the_file_transformers_wrote(published: Path, tmp_path: Path):
    save_pretrained(load_pretrained(published), tmp_path / "out")
    assert same_state(load_file(tmp_path / "out/model.safetensors"), load_file(published / "model.safetensors"))
    theirs = AutoModelForImageTextToText.from_pretrained(published).config.to_dict()
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}


@pytest.mark.parametrize("config", [TEXT_ONLY, SMALL.model_copy(update={"num_shared_experts": 0})])
def test_other_shapes_of_model_go_out_and_come_back(config: ModelConfig, tmp_path: Path):
    ours = our_model(config)
    save_pretrained(ours, tmp_path / "out")
    auto = AutoModelForImageTextToText if config.vision else AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(10, 48, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    again = load_pretrained(tmp_path / "out")
    assert again.config == config
    assert same_state(dict(again.state_dict()), dict(ours.state_dict()))


def test_a_decoder_that_transformers_wrote_alone_is_read(tmp_path: Path):
    save_pretrained(our_model(TEXT_ONLY), tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert same_state(
        dict(load_pretrained(tmp_path / "theirs").state_dict()), dict(load_pretrained(tmp_path / "ours").state_dict())
    )


def test_files_are_split_at_the_limit_and_indexed(tmp_path: Path):
    ours = our_model()
    with open_sink(tmp_path / "out", SMALL, torch.float32, max_shard_bytes=50_000) as sink:
        for name, tensor in reversed(ours.state_dict().items()):
            sink.write(name, tensor)
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert same_state(by_our_names(theirs.state_dict()), dict(ours.state_dict()))
    assert same_state(dict(load_pretrained(tmp_path / "out").state_dict()), dict(ours.state_dict()))


def test_sharded_folders_of_transformers_are_read(published: Path, tmp_path: Path):
    AutoModelForImageTextToText.from_pretrained(published).save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same_state(dict(load_pretrained(tmp_path).state_dict()), dict(load_pretrained(published).state_dict()))


def test_dtype_is_chosen_on_the_way_in_or_out(published: Path, tmp_path: Path):
    model = load_pretrained(published, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_pretrained(model, tmp_path / "same")
    assert {t.dtype for t in load_file(tmp_path / "same/model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    save_pretrained(model, tmp_path / "wide", dtype=torch.float32)
    wide = load_pretrained(tmp_path / "wide")
    assert wide.head.weight.dtype == torch.float32
    assert torch.equal(wide.head.weight, model.head.weight.float())


def test_moving_pieces_of_tensors_changes_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = load_pretrained(published)
    monkeypatch.setattr(tensors, "PIECE_VALUES", 100)
    monkeypatch.setattr(files, "_CONVERT_AT_ONCE", 7)
    pieces = load_pretrained(published)
    assert same_state(dict(pieces.state_dict()), dict(whole.state_dict()))
    save_pretrained(pieces, tmp_path / "out")
    assert same_state(load_file(tmp_path / "out/model.safetensors"), load_file(published / "model.safetensors"))


def test_progress_ends_at_the_total(published: Path, tmp_path: Path):
    seen: list[tuple[str, int, int]] = []
    model = load_pretrained(published, progress=lambda *args: seen.append(args))
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    assert [name for name, _, _ in seen] == list(model.state_dict())
    assert seen[-1][1:] == (total, total)
    seen.clear()
    save_pretrained(model, tmp_path / "out", progress=lambda *args: seen.append(args))
    assert seen[-1][1:] == (total, total)


# ---------------------------------------------------------------------------------------------------------------------
# Namings


def as_in_older_memory(name: str) -> str:
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)


def as_in_memory(name: str) -> str:
    name = as_in_older_memory(name)
    return name.replace("experts.fc1.weight", "experts.gate_up_proj").replace("experts.fc2.weight", "experts.down_proj")


def as_first_released(name: str) -> str | None:
    if "post_layernorm" in name:
        return None
    name = name.replace("vision_tower.", "vision_tower.vision_model.").replace("layer_norm_kv", "ln_kv")
    name = name.replace("multi_modal_projector.layer_norm.", "multi_modal_projector.ln_ffn.")
    return name.replace("multi_modal_projector.feed_forward.", "multi_modal_projector.ffn.")


def renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """A copy of a folder with other tensor names; None leaves a tensor out."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    state = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    state.pop(None, None)
    save_file(state, target / "model.safetensors")  # type: ignore[arg-type]
    return state  # type: ignore[return-value]


def test_names_of_transformers_in_memory_are_read(published: Path, tmp_path: Path):
    """Those of the installed release, and those of others: experts were called otherwise in 5.17."""
    expected = dict(load_pretrained(published).state_dict())
    names = []
    for naming in (as_in_memory, as_in_older_memory):
        names.append(renamed(published, tmp_path / naming.__name__, naming).keys())
        assert same_state(dict(load_pretrained(tmp_path / naming.__name__).state_dict()), expected)
    assert released_model(Sizes()).state_dict().keys() in names


def test_names_of_the_first_releases_are_read(published: Path, tmp_path: Path):
    renamed(published, tmp_path / "first", as_first_released)
    config = json.loads((published / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    text |= {"model_type": "aria_moe_lm", "moe_intermediate_size": text["intermediate_size"], "rope_theta": 5e6}
    text["intermediate_size"] = 13568
    for key in ("rope_parameters", "head_dim"):
        del text[key]
    vision["model_type"] = "aria_vision_model"
    config["projector_patch_to_query_dict"] = {str(k): v for k, v in config["projector_patch_to_query_dict"].items()}
    (tmp_path / "first/config.json").write_text(json.dumps(config))

    model = load_pretrained(tmp_path / "first")
    expected = load_pretrained(published)
    assert model.config == expected.config.model_copy(update={"rope_base": 5e6})
    expected_state = dict(expected.state_dict())
    for name in ("vision.post_norm.weight", "vision.post_norm.bias"):
        expected_state[name] = torch.zeros_like(expected_state[name])
    assert same_state(dict(model.state_dict()), expected_state)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

_ROUND_TRIP = """
import resource, sys
import torch
from pathlib import Path
from aria_train.config import ModelConfig
from aria_train.model.hf import read_tensors, tensor_shapes, write_tensors

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = ModelConfig(vocab_size=1024, hidden_size=1024, num_layers=4, num_heads=8, num_kv_heads=8, num_experts=16,
                     expert_size=512)
before = peak()
write_tensors(folder / "a", config, ((n, torch.full(s, 0.5)) for n, s in tensor_shapes(config).items()), torch.float32)
write_tensors(folder / "b", config, read_tensors(folder / "a", config), torch.float32)
size = sum(path.stat().st_size for path in (folder / "b").iterdir())
print(size >> 20, peak() - before)
"""


def test_a_round_trip_holds_one_tensor_at_a_time(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", _ROUND_TRIP, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    size, growth = (int(word) for word in done.stdout.split())
    assert size > 450
    assert growth < 200
