"""Images: from compressed bytes to the valid patches the vision encoder reads.

Two halves. `decode` turns untrusted bytes into an upright RGB image or raises `BadImage` with a one-line reason.
`process` applies the released preprocessing: longer edge to the size class, shorter edge to at least `min_image_size`,
bicubic, padded right and bottom with 0 before normalising. Patches that would be padding alone are never made. Pixels
stay bytes until a batch is put together.

How many tokens an image becomes is known from its width and height alone (`layout_of`), so that corpora are prepared
and packed without decoding.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aria_train.config import VisionConfig
from aria_train.data.multimodal.positions import position_ids

MAX_PIXELS = 89_478_485
"""Larger images are refused as decompression bombs: the size from which Pillow itself warns, 256 MiB once decoded."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, some of which start other programs (EPS) or are rare and little tested."""

_GRID_CELLS = ((1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2),
               (4, 1), (4, 2), (5, 1), (6, 1), (7, 1), (8, 1))  # fmt: skip
"""Candidate grids for `split`, as (rows, columns) of the unit. The order decides ties."""

# `decode` refuses what Pillow would warn about, with a reason of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """These bytes cannot be used as an image. The message is a short reason, without the image's name."""


@dataclass(frozen=True)
class ProcessedImage:
    """What the vision encoder reads of one image (or of one crop of a split image). p = valid patches."""

    patches: NDArray[np.uint8]
    """[p, 3 * patch * patch]: pixels, channel-major within a patch, row-major over patches; see `normalise`."""
    position_ids: NDArray[np.int64]
    """[p]: index into the learned positions."""
    num_queries: int
    """Visual tokens it becomes."""


@dataclass(frozen=True)
class ImageLayout:
    """How an image is presented: its size class and, when split, the grid its crops are cut from."""

    size: int
    """Size class: longer edge in pixels; of each crop when split."""
    num_queries: int
    """Visual tokens of the image, or of each crop."""
    grid: tuple[int, int] | None = None
    """(height, width) in pixels that a split image is fitted into before it is cut; None = presented whole."""

    @property
    def num_crops(self) -> int:
        """Images the encoder sees."""
        return 1 if self.grid is None else math.ceil(self.grid[0] / self.size) * math.ceil(self.grid[1] / self.size)

    @property
    def num_tokens(self) -> int:
        """Visual tokens in all."""
        return self.num_crops * self.num_queries


# ---------------------------------------------------------------------------------------------------------------------
# Layout: from width and height alone


def layout_of(
    width: int, height: int, vision: VisionConfig, size: int | None = None, split_unit: int | None = None
) -> ImageLayout:
    """The size class of a `width` x `height` image and, when `split_unit` is given, its grid of crops.

    `size` fixes the class. By default it is the smallest class that holds the longer edge without shrinking it, and
    the largest class for anything longer.

    `split_unit` turns on splitting for images whose longer edge exceeds their class: the candidate grids are multiples
    of it, and crops are of the image's class.
    """
    if size is None:
        classes = sorted(vision.image_sizes)
        size = next((candidate for candidate in classes if max(width, height) <= candidate), classes[-1])
    grid = select_grid(width, height, split_unit) if split_unit and max(width, height) > size else None
    return ImageLayout(size, vision.image_sizes[size], grid)


def select_grid(width: int, height: int, unit: int) -> tuple[int, int] | None:
    """The (height, width) in pixels that a split image is fitted into: transformers' rule (that of LLaVA-NeXT).

    Among the candidates the one keeping most of the image's pixels wins, then the one wasting least. None for strips
    so long that no candidate would keep a pixel of their width: they are presented whole. (The rhymes-ai/Aria
    repository has another rule: the nearest aspect ratio, the image stretched to it, and the whole image first, as one
    more crop.)
    """
    best: tuple[int, int] | None = None
    most_kept, least_wasted = 0, math.inf
    for rows, columns in _GRID_CELLS:
        grid_height, grid_width = rows * unit, columns * unit
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_height * grid_width - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (grid_height, grid_width), kept, wasted
    return best if most_kept else None


def resized_size(width: int, height: int, size: int, min_image_size: int) -> tuple[int, int]:
    """(width, height) of an image of class `size` after resizing, in the released float arithmetic."""
    scale = size / max(width, height)
    if width >= height:
        return size, max(int(height * scale), min_image_size)
    return max(int(width * scale), min_image_size), size


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: untrusted bytes


def read_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone. Raises BadImage."""
    image = _open(data)
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def decode(data: bytes) -> Image.Image:
    """An upright RGB image. Raises BadImage with the reason, whatever the bytes are.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8, CMYK and palettes are
    converted, and of an animation the first frame is taken.
    """
    image = _open(data)
    orientation = _orientation(image)
    try:
        image.load()
        image = _to_rgb(image)
    except BadImage:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(f"damaged image: {_one_line(error)}") from None
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """The image with only its header read, and its size checked."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image of a known format (starts with {data[:16]!r})") from None
    except Image.DecompressionBombError:
        raise BadImage(f"too large: over {2 * MAX_PIXELS:,} pixels; at most {MAX_PIXELS:,} are read") from None
    except Exception as error:
        raise BadImage(f"damaged image header: {_one_line(error)}") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"zero-size image ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation as known from the header: sizes must be right without decoding."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns these, and reports the turned size
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole file in search of a chunk behind the pixels
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF does not make the pixels unusable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16 and its byte orders, and I, into which some files' 16 bits are read
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Processing: the released arithmetic


def process(image: Image.Image, layout: ImageLayout, vision: VisionConfig) -> list[ProcessedImage]:
    """The image (mode RGB) as the encoder reads it: one entry, or one per crop, row by row, when split."""
    return [_patchify(_resize(crop, layout.size, vision), layout.num_queries, vision) for crop in _cut(image, layout)]


def blank(layout: ImageLayout, vision: VisionConfig) -> list[ProcessedImage]:
    """Stands in for an image that cannot be decoded: the same tokens, the fewest patches, all of padding's value."""
    pixels = np.zeros((vision.min_image_size, vision.min_image_size, 3), np.uint8)
    return [_patchify(pixels, layout.num_queries, vision)] * layout.num_crops


def _cut(image: Image.Image, layout: ImageLayout) -> list[Image.Image]:
    """The crops: fitted into the grid with its aspect kept, centred on black, cut from the top left."""
    if layout.grid is None:
        return [image]
    height, width = layout.grid
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        fitted = (width, min(math.ceil(image.height * scale_width), height))
    else:
        fitted = (min(math.ceil(image.width * scale_height), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    step = layout.size
    return [
        canvas.crop((left, top, min(left + step, width), min(top + step, height)))
        for top in range(0, height, step)
        for left in range(0, width, step)
    ]


def _resize(image: Image.Image, size: int, vision: VisionConfig) -> NDArray[np.uint8]:
    target = resized_size(image.width, image.height, size, vision.min_image_size)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _patchify(pixels: NDArray[np.uint8], num_queries: int, vision: VisionConfig) -> ProcessedImage:
    """uint8 [height, width, 3] -> valid patches. A patch is valid when any of its pixels is, so sizes round up."""
    patch = vision.patch_size
    height, width = pixels.shape[:2]
    rows, columns = -(-height // patch), -(-width // patch)
    if (height, width) != (rows * patch, columns * patch):
        padded = np.zeros((rows * patch, columns * patch, 3), np.uint8)
        padded[:height, :width] = pixels
        pixels = padded
    patches = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    flat = patches.reshape(rows * columns, 3 * patch * patch)
    return ProcessedImage(flat, position_ids(rows, columns, vision.position_grid), num_queries)


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the encoder multiplies: (x / 255 - mean) / std, with both 0.5."""
    normalised = pixels.astype(np.float32)
    normalised *= np.float32(1 / 127.5)
    normalised -= 1
    return normalised
