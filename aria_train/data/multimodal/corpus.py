"""Multimodal corpora as windows: packed by counted lengths, decoded only when a window is read.

A sample that fits the window is never split. Of a longer one, a document (text and images in order) is cut, but only
where no image is: an image, its crops and its two markers stay in one window. A conversation is not cut, for its later
turns would lose what they answer; it is left out and counted, and so is a sample with an image larger than the window.

An image that cannot be decoded keeps its place in the window, as a blank, and the targets of its sample are dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from aria_train.batch import IGNORE_LABEL
from aria_train.config import ModelConfig, RunConfig, SourceConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.images import BadImage, ProcessedImage
from aria_train.data.multimodal.store import Placement, Sample
from aria_train.data.packing import PLAN_VERSION, PackingPlan, PackingStats, cached_plan, pack
from aria_train.data.views import SampleReader, open_reader
from aria_train.data.window import Window
from aria_train.data.work import forward_flops
from aria_train.errors import DataError

logger = logging.getLogger(__name__)

_CUTTING_VERSION = 1
"""Part of the plan's name: raise it when long samples would be cut elsewhere."""


class MultimodalSource:
    """A prepared multimodal folder, packed into windows. See `Source`."""

    def __init__(self, source: SourceConfig, config: RunConfig) -> None:
        self.name = source.name
        self._context_length, self._model = config.train.context_length, config.model
        path = source.path if isinstance(source.path, str) else source.path[0]
        try:
            places = [Path(path) / "packing", Path(config.train.run_dir) / "packing"]
            self.reader = open_reader(source, Path(path), self._context_length, config.train.seed, places)
            check_fits(self.reader, self._model)
            self.plan = self._plan(config.train.seed, places)
        except DataError as error:
            raise DataError(f"source {source.name!r}: {error}") from None
        self.num_windows = len(self.plan.starts) - 1
        self._report_left_out()
        self._broken: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    # -----------------------------------------------------------------------------------------------------------------
    # Opening

    def _plan(self, seed: int, places: list[Path]) -> PackingPlan:
        folder, meta = self.reader.folder, self.reader.meta
        parts = [PLAN_VERSION, _CUTTING_VERSION, self._context_length, seed]
        parts += [meta["divisible"], meta["fingerprint"]]
        key = f"{self._context_length}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
        plan = cached_plan(places, key, lambda: plan_samples(self.reader, self._context_length, seed))
        if len(plan.starts) == 1:
            raise DataError(
                f"{folder}: none of its {len(self.reader):,} samples fits a window of {self._context_length} tokens "
                f"(train.context_length); the longest has {meta['longest_sample']:,}. Raise "
                "train.context_length, or prepare the corpus with smaller images or shorter samples."
            )
        return plan

    def _report_left_out(self) -> None:
        samples = len(self.reader)
        self.left_out = samples - int((self.plan.pieces == 0).sum())
        if self.left_out and os.environ.get("RANK", "0") == "0":
            why = "an image larger than it" if self.reader.meta["divisible"] else "conversations are not cut"
            logger.warning(
                "source %r: %d of %d samples are longer than train.context_length %d and are left out (%s); the "
                "longest has %d tokens.",
                self.name, self.left_out, samples, self._context_length, why, self.reader.meta["longest_sample"],
            )  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return str(self.reader.meta["fingerprint"])

    @property
    def broken_images(self) -> int:
        """Images met so far that could not be decoded."""
        return len(self._broken)

    def read(self, position: int) -> Window:
        assert 0 <= position < self.num_windows, f"window {position} of {self.num_windows}"
        pieces = slice(int(self.plan.starts[position]), int(self.plan.starts[position + 1]))
        rows, numbers = self.plan.documents[pieces].tolist(), self.plan.pieces[pieces].tolist()
        read = [self._read_piece(row, number) for row, number in zip(rows, numbers, strict=True)]
        window = Window(
            token_ids=np.concatenate([token_ids for token_ids, _, _ in read]),
            labels=np.concatenate([labels for _, labels, _ in read]),
            document_lengths=np.array([len(token_ids) for token_ids, _, _ in read], np.int32),
            images=[image for _, _, processed in read for image in processed],
        )
        if not self._is_sound(window):
            self._refuse(rows)
        return window

    def work(self, position: int) -> float:
        """Of a cut sample's images, each piece counts its share."""
        pieces = slice(int(self.plan.starts[position]), int(self.plan.starts[position + 1]))
        lengths: list[int] = []
        patches: list[int] = []
        for row, number in zip(self.plan.documents[pieces].tolist(), self.plan.pieces[pieces].tolist()):
            positions = self.reader.length(row) - 1
            lengths.append(min(max(positions - number * self._context_length, 1), self._context_length))
            placements = self.reader.placements(row)
            for placement in placements[: round(len(placements) * lengths[-1] / positions)]:
                patches += [(placement.layout.size // self._vision.patch_size) ** 2] * placement.layout.num_crops
        return forward_flops(lengths, patches, self._model)

    def _read_piece(self, row: int, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32], list[ProcessedImage]]:
        """(inputs, labels, images) of a sample, or of its `number`-th piece."""
        sample = self.reader.sample(row)
        positions = len(sample.token_ids) - 1
        start, end = 0, positions
        if positions > self._context_length:
            start, end = cut_points(positions, _kept_whole(sample.placements), self._context_length)[number]
        token_ids, targets = sample.token_ids[start:end], sample.token_ids[start + 1 : end + 1]
        labels = np.where(sample.loss[start + 1 : end + 1] == 1, targets, np.int32(IGNORE_LABEL))
        processed: list[ProcessedImage] = []
        for which, placement in enumerate(sample.placements):
            if start <= placement.start < end:
                decoded = self._decode(sample, row, which)
                if decoded is None:
                    labels[:] = IGNORE_LABEL
                    decoded = images.blank(placement.layout, self._vision)
                processed += decoded
        return token_ids, labels, processed

    def _decode(self, sample: Sample, row: int, which: int) -> list[ProcessedImage] | None:
        """An image of a sample, or None, said once, where it cannot be decoded."""
        try:
            return images.process(images.decode(sample.images[which]), sample.placements[which].layout, self._vision)
        except BadImage as error:
            with self._lock:
                first = (row, which) not in self._broken
                self._broken.add((row, which))
            if first:
                logger.warning(
                    "source %r: sample %d (from %s): image %d: %s. A blank stands in for it and the sample's targets "
                    "are dropped.", self.name, row, sample.origin, which + 1, error,
                )  # fmt: skip
            return None

    @property
    def _vision(self) -> images.VisionConfig:
        assert self._model.vision is not None, "checked when the source was opened"
        return self._model.vision

    def _is_sound(self, window: Window) -> bool:
        """Token ids reach embedding tables and image counts: damage to a file must not go that far."""
        ids = np.concatenate([window.token_ids, window.labels[window.labels != IGNORE_LABEL]])
        image_tokens = np.count_nonzero(window.token_ids == self._model.image_token_id)
        expected = sum(image.num_queries for image in window.images)
        return ids.min() >= 0 and ids.max() < self._model.vocab_size and image_tokens == expected

    def _refuse(self, rows: list[int]) -> NoReturn:
        """Names the damaged one of a window's samples."""
        wrong = next(filter(None, map(self._damage, rows)), f"samples {rows} hold image tokens where no image stands")
        raise DataError(f"{self.reader.folder}: {wrong}. The corpus is damaged: copy or prepare it again.")

    def _damage(self, row: int) -> str | None:
        sample = self.reader.sample(row)
        largest, smallest = int(sample.token_ids.max()), int(sample.token_ids.min())
        image_tokens = np.count_nonzero(sample.token_ids == self._model.image_token_id)
        expected = sum(placement.layout.num_tokens for placement in sample.placements)
        if largest >= self._model.vocab_size or smallest < 0:
            outside = largest if smallest >= 0 else smallest
            return f"sample {row} holds token id {outside}, outside 0 to {self._model.vocab_size - 1}"
        if image_tokens != expected:
            return f"sample {row} holds {image_tokens} image tokens for images of {expected}"
        return None


def plan_samples(reader: SampleReader, context_length: int, seed: int) -> PackingPlan:
    """Packs the samples of a corpus into windows of `context_length` positions; those that cannot fit have no piece."""
    positions = reader.lengths().astype(np.int64) - 1
    fits = positions <= context_length
    documents, pieces, lengths = [np.flatnonzero(fits)], [np.zeros(int(fits.sum()), np.int64)], [positions[fits]]
    cut = 0
    for row in np.flatnonzero(~fits).tolist() if reader.meta["divisible"] else []:
        bounds = cut_points(int(positions[row]), _kept_whole(reader.placements(row)), context_length)
        cut += bool(bounds)
        documents.append(np.full(len(bounds), row))
        pieces.append(np.arange(len(bounds)))
        lengths.append(np.array([end - start for start, end in bounds], np.int64))
    all_lengths = np.concatenate(lengths)
    starts, order = pack(all_lengths, context_length, seed)
    windows, filled = len(starts) - 1, int(all_lengths.sum())
    stats = PackingStats(
        documents=len(positions),
        without_targets=0,
        cut=cut,
        targets=filled,
        windows=windows,
        efficiency=filled / (windows * context_length) if windows else 0.0,
    )
    return PackingPlan(starts, np.concatenate(documents)[order], np.concatenate(pieces)[order].astype(np.int32), stats)


def _kept_whole(placements: list[Placement]) -> list[tuple[int, int]]:
    """Stretches of a document that are never cut: each image with the marker on either side."""
    return [(placement.start - 1, placement.end + 1) for placement in placements]


def check_fits(reader: SampleReader, model: ModelConfig) -> None:
    """What was settled when a corpus was prepared must be what the model expects. Raises DataError."""
    meta, folder = reader.meta, reader.folder
    if meta["largest_token_id"] >= model.vocab_size:
        raise DataError(
            f"{folder}: holds token id {meta['largest_token_id']}, but the model's vocabulary is 0 to "
            f"{model.vocab_size - 1}. Prepare the corpus with the model's tokenizer, or set model.vocab_size."
        )
    if not meta["images"]:
        return
    if model.vision is None:
        raise DataError(
            f"{folder}: holds {meta['images']:,} images, but the model has no vision encoder. Add a model.vision "
            "section, or take this source out of the blend."
        )
    if meta["image_token_id"] != model.image_token_id:
        raise DataError(
            f"{folder}: marks images with token id {meta['image_token_id']}, but model.image_token_id is "
            f"{model.image_token_id}. Prepare the corpus with this model's configuration, or set the id."
        )
    prepared = {int(size): queries for size, queries in meta["image_sizes"].items()}
    if any(model.vision.image_sizes.get(size) != queries for size, queries in prepared.items()):
        raise DataError(
            f"{folder}: was prepared for image sizes {prepared} (longer edge: tokens), but "
            f"model.vision.image_sizes is {model.vision.image_sizes}. Prepare it with this model's configuration."
        )


def cut_points(positions: int, whole: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Cuts `positions` into consecutive (start, end) pieces of at most `length`, none inside a stretch of `whole`.

    Each piece is as long as it can be. `whole` is in ascending order and does not overlap. Where one of its stretches
    is itself longer than `length`, there is no way: an empty list.
    """
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < positions:
        end = min(start + length, positions)
        if end < positions:
            end = next((first for first, behind in whole if first < end < behind), end)
        if end <= start:
            return []
        pieces.append((start, end))
        start = end
    return pieces
