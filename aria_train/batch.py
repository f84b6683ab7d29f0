"""What one forward pass consumes: packed tokens and packed image patches, without padding.

Windows of a micro-batch are laid end to end and so are the documents in them; a document is the unit of attention.
Shape legend: T tokens, D documents, P patches, N images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

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

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_LABEL).sum())

    def position_ids(self) -> Tensor:
        """int64 [T]: positions count from 0 in every document."""
        lengths = self.starts.diff()
        offsets = torch.repeat_interleave(self.starts[:-1], lengths, output_size=self.token_ids.shape[0])
        return torch.arange(self.token_ids.shape[0], device=offsets.device) - offsets

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on a device; pinned memory makes the copies asynchronous."""
        return _to(self, device)


def _to(value, device: torch.device):
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]
    return value
