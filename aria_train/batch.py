"""What one forward pass consumes: packed tokens and packed image patches, without padding.

Windows of a micro-batch are laid end to end and so are the documents in them; a document is the unit of attention.
Shape legend: T tokens, D documents, P patches, N images.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_LABEL = -100
"""Label of a position that is not a prediction target."""


@dataclass
class ImageBatch:
    """All images of a micro-batch as one sequence of valid patches."""

    patches: Tensor
    """float [P, 3 * patch * patch]: normalised pixels, channel-major within a patch, row-major over patches."""
    position_ids: Tensor
    """int64 [P]: index into the learned positions."""
    starts: Tensor
    """int32 [N + 1]: first patch of each image, then P."""
    num_queries: list[int]
    """Visual tokens each image becomes, in order of appearance."""
    query_starts: Tensor | None = None
    """int32 [N + 1]: first visual token of each image, then their number; worked out from `num_queries`."""

    def __post_init__(self) -> None:
        if self.query_starts is None:
            starts = [0, *itertools.accumulate(self.num_queries)]
            self.query_starts = torch.tensor(starts, dtype=torch.int32, device=self.starts.device)

    @classmethod
    def empty(cls, patch_size: int, device: torch.device | None = None) -> ImageBatch:
        """No images: what a rank whose micro-batch is all text sends through the encoder."""
        patches = torch.zeros(0, 3 * patch_size**2, device=device)
        ids = torch.zeros(0, dtype=torch.int64, device=device)
        starts = torch.zeros(1, dtype=torch.int32, device=device)
        return cls(patches, ids, starts, [], query_starts=starts)

    def to(self, device: torch.device) -> ImageBatch:
        moved: ImageBatch = _to(self, device)
        return moved


@dataclass
class MicroBatch:
    """Packed documents of some windows. `labels[i]` is the token that position i predicts, or IGNORE_LABEL."""

    token_ids: Tensor
    """int64 [T]"""
    labels: Tensor
    """int64 [T]"""
    starts: Tensor
    """int32 [D + 1]: first token of each document, then T."""
    max_document: int
    """Tokens in the longest document."""
    source_ids: Tensor
    """int64 [D]: which source of the blend each document came from."""
    images: ImageBatch | None = None
    target_positions: Tensor | None = None
    """int64 [number of targets]: positions with a label, worked out on the host so that no device has to wait."""
    visual_positions: Tensor | None = None
    """int64 [visual tokens]: where images stand in the text, worked out on the host by the loader. None: the model
    looks for them, and its device waits."""

    def __post_init__(self) -> None:
        if self.target_positions is None:
            self.target_positions = (self.labels != IGNORE_LABEL).nonzero().squeeze(1)

    @property
    def num_targets(self) -> int:
        assert self.target_positions is not None
        return self.target_positions.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_images(self) -> int:
        return 0 if self.images is None else len(self.images.num_queries)

    def source_of_target(self) -> Tensor:
        """int64 [number of targets]: the source each target came from."""
        per_token = torch.repeat_interleave(self.source_ids, self.starts.diff(), output_size=self.num_tokens)
        return per_token[self.target_positions]

    def position_ids(self) -> Tensor:
        """int64 [T]: positions count from 0 in every document."""
        offsets = torch.repeat_interleave(self.starts[:-1], self.starts.diff(), output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=offsets.device) - offsets

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on a device; pinned memory makes the copies asynchronous."""
        moved: MicroBatch = _to(self, device)
        return moved


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _to(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
