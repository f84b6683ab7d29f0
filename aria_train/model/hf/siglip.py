"""Initial weights of the vision encoder from SigLIP (SO400M for the full-size model), as Aria's training began.

SigLIP learned positions for one image size; they are resized, as images are, by bicubic interpolation to our grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.config import VisionConfig
from aria_train.errors import CheckpointError
from aria_train.model.hf.config import SIGLIP_DEFAULTS, read_json
from aria_train.model.hf.files import StoredTensor, find_tensors, summary
from aria_train.model.hf.names import published_name
from aria_train.model.hf.tensors import Shape
from aria_train.model.vision import VisionEncoder

_POSITIONS = "vision.position_embedding.weight"
_NOT_USED = re.compile(r"(head\.|post_layernorm\.|embeddings\.position_ids$|text_model\.|logit_scale$|logit_bias$)")
"""What SigLIP has beside the layers: its pooling head, the norm before it, and the text half with its scale."""


def read_siglip(hf_dir: str | Path, vision: VisionConfig) -> SiglipTensors:
    """The tensors of a SigLIP checkpoint that begin a vision encoder, to be iterated: (our name, tensor).

    Reads SiglipModel and SiglipVisionModel folders, with or without the `vision_model.` prefix. Raises CheckpointError
    naming what is missing, unknown, or of another shape.
    """
    return SiglipTensors(Path(hf_dir), vision)


class SiglipTensors:
    """What `read_siglip` returns: every tensor of the vision encoder, under our names, as stored."""

    def __init__(self, folder: Path, vision: VisionConfig) -> None:
        self._grid = vision.position_grid
        with torch.device("meta"):
            weights = VisionEncoder(vision).state_dict()
        self.shapes = {f"vision.{name}": tuple(tensor.shape) for name, tensor in weights.items()}
        """Our name -> shape."""
        self.not_used: list[str] = []
        """Tensors of the checkpoint that have no place in Aria, for reports."""
        self._stored: dict[str, StoredTensor] = {}
        _check_heads(folder, vision)
        self._match(folder)

    def _match(self, folder: Path) -> None:
        wanted = {published_name(name).removeprefix("vision_tower."): name for name in self.shapes}
        unknown, misshapen = [], []
        for stored_name, stored in find_tensors(folder).items():
            name = re.sub(r"^(vision_tower\.|model\.)?(vision_model\.)?", "", stored_name)
            if _NOT_USED.match(name):
                self.not_used.append(stored_name)
            elif name not in wanted or wanted[name] in self._stored:
                unknown.append(stored_name)
            else:
                ours = wanted[name]
                self._stored[ours] = stored
                if not self._fits(ours, stored.shape):
                    misshapen.append(f"{stored_name} is {list(stored.shape)}, not {list(self.shapes[ours])}")
        missing = [name for name, ours in wanted.items() if ours not in self._stored]
        missing = [name for name in missing if not _NOT_USED.match(name)]
        problems = [
            f"{len(names)} {what}: {summary(sorted(names))}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: not the SigLIP checkpoint that model.vision describes. {'; '.join(problems)}."
            )

    def _fits(self, ours: str, shape: Shape) -> bool:
        """Equal shapes; positions may be those of any square grid."""
        if ours == _POSITIONS and len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0] > 0:
            return shape[1] == self.shapes[ours][1]
        return shape == self.shapes[ours]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.shapes.items():
            if name not in self._stored:
                # The encoder's final norm, which Aria does not use: zeros, as in its own releases.
                yield name, torch.zeros(shape, dtype=self._stored[_POSITIONS].dtype)
            elif name == _POSITIONS:
                yield name, resize_positions(self._stored[name].read(), self._grid)
            else:
                yield name, self._stored[name].read()


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Learned positions of a square grid, [n * n, C] -> [grid * grid, C], by bicubic interpolation in fp32."""
    side = math.isqrt(positions.shape[0])
    if side == grid:
        return positions
    image = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)


def _check_heads(folder: Path, vision: VisionConfig) -> None:
    """The one thing shapes do not tell, if the folder has a config.json."""
    path = folder / "config.json"
    if not path.is_file():
        return
    raw = read_json(path)
    heads = raw.get("vision_config", raw).get("num_attention_heads", SIGLIP_DEFAULTS["num_attention_heads"])
    if heads != vision.num_heads:
        raise CheckpointError(f"{path}: {heads} attention heads, but model.vision.num_heads is {vision.num_heads}.")
