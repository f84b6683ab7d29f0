"""From the global window index to micro-batches on a rank.

`window n -> (source, k-th window of it) -> epoch k // N, permuted position in it -> Window`, and some windows laid end
to end make a MicroBatch. All of it is a pure function of (configuration, n), so the only state is the step: resuming
is starting there, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.config import RunConfig
from aria_train.data.mixture import Mixture
from aria_train.data.multimodal.images import normalise
from aria_train.data.permutation import permute
from aria_train.data.text.corpus import open_source
from aria_train.data.window import Source, Window
from aria_train.data.work import deal
from aria_train.errors import ConfigError


class Blend:
    """The training stream: window n of the run, whoever asks. Safe to read from many threads."""

    def __init__(self, config: RunConfig) -> None:
        if not config.data.train:
            raise ConfigError(
                "data.train: no source given; list at least one, such as {name: web, path: data/web}. "
                "`aria-train data prepare` makes a corpus."
            )
        self.seed, self._image_token_id = config.train.seed, config.model.image_token_id
        self.sources: list[Source] = [open_source(source, config) for source in config.data.train]
        self.mixture = Mixture([source.weight for source in config.data.train])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, position in it) of window `index`; each epoch of a source is another permutation of it."""
        which, number = self.mixture.locate(index)
        source = self.sources[which]
        epoch, place = divmod(number, source.num_windows)
        return which, permute(place, source.num_windows, f"{self.seed}/{source.name}/{epoch}")

    def work(self, index: int) -> float:
        """About how many floating-point operations window `index` takes."""
        which, position = self.locate(index)
        return self.sources[which].work(position)

    def micro_batch(self, windows: Iterable[int]) -> MicroBatch:
        """Windows of the run, packed."""
        places = [self.locate(index) for index in windows]
        windows_of_batch = [self.sources[which].read(position) for which, position in places]
        return pack_windows(windows_of_batch, [which for which, _ in places], self._image_token_id)


class Loader:
    """Iterates the training stream: per optimizer step, the micro-batches of one rank.

    Step s holds windows [s * G, (s + 1) * G), G = train.global_batch_size; rank r takes the r-th contiguous slice of
    them or, with `data.balance_work`, those that `work.deal` gives it. Threads keep `data.prefetch_batches`
    micro-batches ahead; what goes wrong in one is raised where its batch is asked for. Endless; close it, or use it in
    a `with` block.
    """

    def __init__(self, config: RunConfig, rank: int = 0, world_size: int = 1, start_step: int = 0) -> None:
        train = config.train
        self.micro_batch_size, self.global_batch_size = train.micro_batch_size, train.global_batch_size
        self.num_micro_batches, rest = divmod(self.global_batch_size, world_size * self.micro_batch_size)
        assert not rest, "check_world admits only batches that divide evenly"
        self.blend = Blend(config)
        self._rank, self._world_size = rank, world_size
        self._balanced = config.data.balance_work and world_size > 1
        self._dealt = functools.lru_cache(maxsize=8)(self._deal)
        self._places = ((step, i) for step in itertools.count(start_step) for i in range(self.num_micro_batches))
        self._ahead = config.data.prefetch_batches
        self._pool = ThreadPoolExecutor(config.data.workers, "loader", initializer=_same_device())
        self._pending: deque[Future[MicroBatch]] = deque()
        self._closed = False

    @property
    def sources(self) -> list[Source]:
        """The sources of the blend; `MicroBatch.source_ids` index them."""
        return self.blend.sources

    def epochs(self, step: int) -> dict[str, float]:
        """`epochs/<source>`: how often each source has been gone through in the first `step` steps of the run."""
        windows = step * self.global_batch_size
        return {
            f"epochs/{source.name}": self.blend.mixture.count(index, windows) / source.num_windows
            for index, source in enumerate(self.sources)
        }

    def _deal(self, step: int) -> NDArray[np.int64]:
        """int64 [micro-batches, micro_batch_size]: this rank's windows of a step."""
        first = step * self.global_batch_size
        if not self._balanced:
            share = self.global_batch_size // self._world_size
            return (first + self._rank * share + np.arange(share)).reshape(-1, self.micro_batch_size)
        work = [self.blend.work(first + number) for number in range(self.global_batch_size)]
        return first + deal(work, self._world_size, self.micro_batch_size)[:, self._rank]

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """The micro-batches of the next step."""
        if self._closed:
            raise StopIteration
        return [self._next_micro_batch() for _ in range(self.num_micro_batches)]

    def _next_micro_batch(self) -> MicroBatch:
        while len(self._pending) < self._ahead + 1:
            self._pending.append(self._pool.submit(self._load, *next(self._places)))
        return self._pending.popleft().result()

    def _load(self, step: int, number: int) -> MicroBatch:
        return pin(self.blend.micro_batch(self._dealt(step)[number].tolist()))

    def close(self) -> None:
        """Stops the threads; they finish the batch they are at."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_validation(config: RunConfig) -> list[Source]:
    """The sources of `data.validation`, alike for every train.seed, so that losses of different runs compare."""
    fixed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})
    return [open_source(source, fixed) for source in config.data.validation]


def validation_batches(
    config: RunConfig, rank: int = 0, world_size: int = 1, sources: Sequence[Source] | None = None
) -> Iterator[MicroBatch]:
    """The first `train.eval_windows` windows (or all, if fewer) of each source of `data.validation`, in a fixed
    shuffled order: this rank's share of them, at most `train.micro_batch_size` per batch.

    A batch holds one source's windows, and `source_ids` index `data.validation`. Ranks may get different numbers of
    batches, or none. `sources`: what `open_validation` gave, for those who come again; None: they are opened now.
    """
    for which, source in enumerate(open_validation(config) if sources is None else sources):
        mine = range(rank, min(config.train.eval_windows, source.num_windows), world_size)
        for at in range(0, len(mine), config.train.micro_batch_size):
            batch = mine[at : at + config.train.micro_batch_size]
            positions = [permute(place, source.num_windows, "validation") for place in batch]
            windows = [source.read(position) for position in positions]
            yield pin(pack_windows(windows, [which] * len(batch), config.model.image_token_id))


def pack_windows(windows: Sequence[Window], sources: Sequence[int], image_token_id: int | None = None) -> MicroBatch:
    """Lays windows end to end; `sources` says which source of the blend each came from.

    With `image_token_id`, the batch says where its visual tokens stand, and no device has to look for them.
    """
    token_ids = np.concatenate([window.token_ids for window in windows]).astype(np.int64)
    visual_positions = None
    if image_token_id is not None:
        visual_positions = torch.from_numpy(np.flatnonzero(token_ids == image_token_id))
    lengths = np.concatenate([window.document_lengths for window in windows])
    documents = [len(window.document_lengths) for window in windows]
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        labels=torch.from_numpy(np.concatenate([window.labels for window in windows]).astype(np.int64)),
        starts=_starts(lengths),
        max_document=int(lengths.max()),
        source_ids=torch.from_numpy(np.repeat(np.asarray(sources, np.int64), documents)),
        images=_pack_images(windows),
        visual_positions=visual_positions,
    )


def _pack_images(windows: Sequence[Window]) -> ImageBatch | None:
    images = [image for window in windows for image in window.images]
    if not images:
        return None
    return ImageBatch(
        patches=torch.from_numpy(normalise(np.concatenate([image.patches for image in images]))),
        position_ids=torch.from_numpy(np.concatenate([image.position_ids for image in images])),
        starts=_starts([len(image.patches) for image in images]),
        num_queries=[image.num_queries for image in images],
    )


def _starts(lengths: Iterable[int]) -> torch.Tensor:
    """int32 [n + 1]: where each of n stretches begins, then where the last one ends."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def pin(batch: MicroBatch) -> MicroBatch:
    """The batch in page-locked memory, from which copies to a GPU run beside computation, in a process that uses one;
    elsewhere, as it is."""
    return _pin(batch) if torch.cuda.is_initialized() else batch


def _same_device() -> Callable[[], None] | None:
    """What a thread does first: it uses this thread's GPU. By itself it would page-lock memory for the first one, and
    every rank's take room there."""
    if not torch.cuda.is_initialized():
        return None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def _pin(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _pin(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
