"""Video as images: frames sampled uniformly over time, kept compressed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image

from aria_train.config import VisionConfig
from aria_train.data.multimodal.images import MAX_PIXELS, BadImage, resized_size

MAX_FRAMES = 1024
"""Most frames one video may give."""

_SEEK_SECONDS = 5.0
"""Jumps longer than this seek to the keyframe before; shorter ones decode on."""

_MAX_DECODED = 20_000
"""Most frames decoded between two sampled ones: bounds the time a file with bad timestamps or no keyframes can take."""


def sample_frames(path: Path, num_frames: int, vision: VisionConfig) -> list[bytes]:
    """At most `num_frames` frames as JPEG, in order: those on screen in the middle of equal parts of the duration.

    A video with fewer frames gives each once. Frames larger than the smallest size class (at which frames are
    presented) are stored at its size, so that processing them later changes no pixel. Raises BadImage.
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise BadImage(f"num_frames must be 1 to {MAX_FRAMES}, not {num_frames}")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            return [_compress(frame, vision) for frame in _sample(container, num_frames)]
    except (av.error.FFmpegError, ValueError, EOFError, OSError) as error:
        raise BadImage(f"unreadable video: {' '.join(str(error).split())[:120]}") from None


def _sample(container: av.container.InputContainer, num_frames: int) -> Iterator[av.VideoFrame]:
    if not container.streams.video:
        raise BadImage("no video stream")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_PIXELS:
        raise BadImage(f"too large: frames of {stream.width} x {stream.height}; at most {MAX_PIXELS:,} pixels are read")
    stream.thread_type = "AUTO"
    start, duration = _span(container, stream)
    frames = container.decode(stream)
    current = following = next(frames, None)
    if current is None:
        raise BadImage("a video without frames")
    last_given = None
    for number in range(num_frames):
        target = start + (number + 0.5) / num_frames * duration
        if target - (current.time or 0.0) > _SEEK_SECONDS:
            container.seek(int(target * av.time_base))
            frames = container.decode(stream)
            current = following = next(frames, current)
        for _ in range(_MAX_DECODED):  # until `following` is past the target: `current` is then on screen
            if following is None or (following.time or 0.0) > target:
                break
            current, following = following, next(frames, None)
        else:
            raise BadImage(f"more than {_MAX_DECODED} frames to decode for one")
        if current.pts != last_given:
            last_given = current.pts
            yield current


def _span(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float, float]:
    """Start and duration in seconds."""
    tick = float(stream.time_base or 0)
    start = (stream.start_time or 0) * tick
    if stream.duration and tick:
        return start, stream.duration * tick
    if container.duration:
        return start, container.duration / av.time_base
    raise BadImage("a video of unknown duration")


def _compress(frame: av.VideoFrame, vision: VisionConfig) -> bytes:
    image = frame.to_image()
    if frame.rotation:  # of the display matrix, counterclockwise, as phones write it
        image = image.rotate(frame.rotation, expand=True)
    size = min(vision.image_sizes)
    if max(image.size) > size:
        target = resized_size(image.width, image.height, size, vision.min_image_size)
        image = image.resize(target, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
