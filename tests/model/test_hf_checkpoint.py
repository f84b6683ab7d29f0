"""Between Hugging Face folders and distributed checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from aria_train.errors import CheckpointError
from aria_train.model.hf import load_pretrained, open_sink, read_tensors, save_pretrained, tensors
from aria_train.model.hf.checkpoint import read_distributed, write_distributed
from tests.model.small import SMALL, our_model, same_state

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    save_pretrained(our_model(), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("piece_values", [2**25, 500])
def test_import_is_a_checkpoint_that_loads_anywhere(
    piece_values: int, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "PIECE_VALUES", piece_values)
    seen: list[tuple[str, int, int]] = []
    write_distributed(read_tensors(hf_dir, SMALL), tmp_path / "checkpoint", progress=lambda *args: seen.append(args))
    loaded = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in our_model().state_dict().items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert same_state(loaded, {f"model.{name}": tensor for name, tensor in our_model().state_dict().items()})
    assert seen[-1][1] == seen[-1][2] == sum(tensor.numel() for tensor in loaded.values())
    # Nothing but regular file names of the kind distributed checkpoints have.
    assert all(path.suffix == ".distcp" or path.name == ".metadata" for path in (tmp_path / "checkpoint").iterdir())


def test_there_and_back_is_bitwise(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "PIECE_VALUES", 500)
    write_distributed(read_tensors(hf_dir, SMALL), tmp_path / "checkpoint")
    with open_sink(tmp_path / "again", SMALL, torch.float32) as sink:
        read_distributed(tmp_path / "checkpoint", sink)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (hf_dir / "model.safetensors").read_bytes()


def test_a_trained_checkpoint_with_optimizer_state_is_exported(tmp_path: Path):
    model = our_model()
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["optimizer.embed.weight.exp_avg"] = torch.ones_like(model.embed.weight)
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    with open_sink(tmp_path / "hf", SMALL, torch.bfloat16) as sink:
        read_distributed(tmp_path / "checkpoint", sink)
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert same_state(dict(load_pretrained(tmp_path / "hf").state_dict()), expected)


def test_boxes_cut_along_any_dimension_land_where_they_belong(tmp_path: Path):
    """Ranks may hold rows of every expert rather than whole experts."""
    state = our_model().state_dict()
    with open_sink(tmp_path / "hf", SMALL, torch.float32) as sink:
        for name, tensor in state.items():
            if name.endswith("experts.down"):  # [8, 12, 32]
                for expert in (0, 4):
                    for row in (8, 0, 4):
                        sink.write(name, tensor[expert : expert + 4, row : row + 4], (expert, row, 0))
            elif tensor.ndim == 2:
                half = tensor.shape[1] // 2
                sink.write(name, tensor[:, half:], (0, half))
                sink.write(name, tensor[:, :half], (0, 0))
            else:
                sink.write(name, tensor)
    assert same_state(dict(load_pretrained(tmp_path / "hf").state_dict()), dict(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), r"1 tensor\(s\) of the model missing, such as norm\.weight"),
        (lambda s: s.update({"model.surprise": torch.ones(1)}), "Tensor surprise .* is not one of this model's"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"Tensor norm\.weight is \[3\]; this model's"),
    ],
)
def test_a_checkpoint_of_another_model_leaves_nothing(change, message: str, tmp_path: Path):
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in our_model().state_dict().items()}
    change(state)
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    with pytest.raises(CheckpointError, match=message), open_sink(tmp_path / "hf", SMALL, torch.float32) as sink:
        read_distributed(tmp_path / "checkpoint", sink)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_file_damaged_after_the_check_is_a_user_error(hf_dir: Path, tmp_path: Path):
    source = read_tensors(hf_dir, SMALL)
    data = (hf_dir / "model.safetensors").read_bytes()
    (hf_dir / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read: the file ends early"):
        write_distributed(source, tmp_path / "checkpoint")
