"""Videos become frames: spread evenly, upright, and images like any other."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

from aria_train.data.multimodal import images
from aria_train.data.multimodal.video import sample_frames
from tests.data.records import PICTURE, VISION, assistant, encode, text, text_of, user


def write_video(path: Path, frames: int = 20, rate: int = 5, width: int = 64, height: int = 48, turn: int = 0) -> None:
    """Frame i is grey of brightness 10 * i, its top half white when the video is marked as turned."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 6
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            pixels = np.full((height, width, 3), 10 * number, np.uint8)
            if turn:
                pixels[: height // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def brightness(frame: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(frame))).mean())


def test_frames_are_spread_uniformly(tmp_path):
    write_video(tmp_path / "video.mp4")
    frames = sample_frames(tmp_path / "video.mp4", 4, VISION)
    assert [round(brightness(frame) / 10) for frame in frames] == [2, 7, 12, 17]
    assert images.decode(frames[0]).size == (56, 42), "of the smallest class"
    assert frames == sample_frames(tmp_path / "video.mp4", 4, VISION)


def test_long_videos_are_sought_and_short_ones_give_each_frame_once(tmp_path):
    write_video(tmp_path / "long.mp4", frames=25, rate=1)
    frames = sample_frames(tmp_path / "long.mp4", 2, VISION)
    assert [round(brightness(frame) / 10) for frame in frames] == [6, 18]
    write_video(tmp_path / "short.mp4", frames=3)
    assert [round(brightness(f) / 10) for f in sample_frames(tmp_path / "short.mp4", 8, VISION)] == [0, 1, 2]


def test_a_phone_held_upright_gives_upright_frames(tmp_path):
    write_video(tmp_path / "video.mp4", frames=4, turn=90)
    (frame,) = sample_frames(tmp_path / "video.mp4", 1, VISION)
    picture = np.asarray(images.decode(frame)).astype(int)
    assert picture.shape == (56, 42, 3)
    assert picture[:, :15].mean() > 200 > 60 > picture[:, -15:].mean(), "the top is at the left: a quarter turn"


def test_a_video_becomes_its_frames_as_images(tokenizer, folder):
    write_video(folder / "video.mp4")
    record = {
        "messages": [user({"type": "video", "text": None}, text("What?")), assistant("A cat.")],
        "video": {"path": "video.mp4", "num_frames": 3},
    }
    sample = encode(tokenizer, "chat", record, folder, image_size=112)
    shown = text_of(tokenizer, sample.token_ids).replace("<|img|>" * 4, "<|img|>")
    assert shown.startswith(f"<|im_start|>user\n{PICTURE * 3}What?")
    assert [placement.layout.size for placement in sample.placements] == [56] * 3
