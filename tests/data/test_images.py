"""Images: the released preprocessing, patch by patch, and every kind of file a corpus holds."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from aria_train.config import VisionConfig
from aria_train.data.multimodal import images
from aria_train.data.multimodal.images import BadImage, ImageLayout
from aria_train.data.multimodal.positions import position_ids

ARIA = VisionConfig()
SMALL = VisionConfig(patch_size=14, image_sizes={56: 4, 112: 16}, min_image_size=28, position_grid=8)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blocks and noise: sharp edges tell resampling filters apart."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (1 + height // 9, 1 + width // 9, 3), dtype=np.uint8)
    pixels = np.repeat(np.repeat(coarse, 9, 0), 9, 1)[:height, :width]
    return Image.fromarray(pixels ^ generator.integers(0, 32, pixels.shape, dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def unpatch(processed: images.ProcessedImage, rows: int, columns: int, patch: int) -> np.ndarray:
    """Patches, as the encoder multiplies them, back to pixels: [3, rows * patch, columns * patch]."""
    grid = images.normalise(processed.patches).reshape(rows, columns, 3, patch, patch)
    return grid.transpose(2, 0, 3, 1, 4).reshape(3, rows * patch, columns * patch)


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the released preprocessing


@pytest.fixture(scope="module")
def released():
    module = pytest.importorskip("transformers.models.aria.image_processing_pil_aria")
    return module.AriaImageProcessorPil()


def expect_released(crops, output, size: int, num_queries: int) -> float:
    """Compares with the released pixel values and mask; returns the largest deviation of a pixel."""
    assert len(crops) == len(output["pixel_values"])
    worst = 0.0
    for crop, pixels, mask in zip(crops, output["pixel_values"], output["pixel_mask"], strict=True):
        # A patch is valid when any of its pixels is.
        valid = mask.reshape(size // 14, 14, size // 14, 14).any(axis=(1, 3))
        rows, columns = int(valid[:, 0].sum()), int(valid[0].sum())
        assert crop.patches.shape == (rows * columns, 3 * 14 * 14)
        assert crop.patches.dtype == np.uint8
        assert crop.num_queries == num_queries
        np.testing.assert_array_equal(crop.position_ids, position_ids(rows, columns, 70))
        expected = np.asarray(pixels)[:, : rows * 14, : columns * 14]
        worst = max(worst, float(np.abs(unpatch(crop, rows, columns, 14) - expected).max()))
    return worst


def sides(count: int, seed: int) -> list[tuple[int, int]]:
    """Sizes with log-uniform sides, so that strips and tiny images are as likely as photographs."""
    generator = np.random.default_rng(seed)
    return [tuple(int(v) for v in np.exp(generator.uniform(0, np.log(1400), 2)) + 0.5) for _ in range(count)]


@pytest.mark.parametrize("part", range(4))
def test_patches_equal_the_released_preprocessing_over_200_sizes(released, part):
    worst = 0.0
    for number, (width, height) in enumerate(sides(50, seed=part)):
        image = noise(width, height, number)
        size = 980 if number % 10 == 0 else 490
        layout = images.layout_of(width, height, ARIA, size=size)
        output = released(image, max_image_size=size, return_tensors="np")
        crops = images.process(image, layout, ARIA)
        worst = max(worst, expect_released(crops, output, size, {490: 128, 980: 256}[size]))
    assert worst < 1e-6, "the same resampling of the same pixels"


def test_split_images_equal_the_released_crops(released):
    for number, (width, height) in enumerate([(1500, 1100), (700, 2100), (3000, 400), (991, 990), (2600, 1300)]):
        image = noise(width, height, number)
        layout = images.layout_of(width, height, ARIA, size=490, split_unit=490)
        output = released(image, max_image_size=490, split_image=True, return_tensors="np")
        crops = images.process(image, layout, ARIA)
        assert len(crops) == layout.num_crops > 1
        assert expect_released(crops, output, 490, 128) < 1e-6


def test_grid_equals_the_released_choice_over_many_sizes(released):
    select = pytest.importorskip("transformers.image_processing_utils").select_best_resolution
    for width, height in sides(2000, seed=9):
        chosen = select((height, width), released.split_resolutions)
        assert images.select_grid(width, height, 490) == chosen


def test_split_cuts_into_the_largest_class_when_asked(released):
    layout = images.layout_of(1800, 1200, ARIA, split_unit=490)
    image = noise(1800, 1200)
    output = released(image, max_image_size=980, split_image=True, return_tensors="np")
    assert layout == ImageLayout(980, 256, (980, 1470))
    assert expect_released(images.process(image, layout, ARIA), output, 980, 256) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Layout and counting


def test_class_is_the_smallest_that_holds_the_image():
    assert images.layout_of(490, 10, ARIA) == ImageLayout(490, 128)
    assert images.layout_of(10, 491, ARIA) == ImageLayout(980, 256)
    assert images.layout_of(5000, 5000, ARIA) == ImageLayout(980, 256)
    assert images.layout_of(5000, 5000, ARIA, size=490) == ImageLayout(490, 128)


def test_tokens_are_counted_from_the_size_alone():
    layout_of = images.layout_of
    assert layout_of(100, 100, ARIA).num_tokens == 128
    assert layout_of(1000, 100, ARIA).num_tokens == 256
    assert layout_of(4000, 4000, ARIA, size=490, split_unit=490).num_tokens == 4 * 128
    assert layout_of(300, 300, ARIA, size=490, split_unit=490).num_tokens == 128, "small images are not split"
    assert layout_of(3000, 3000, ARIA, split_unit=980).num_tokens == 4 * 256, "units of the large class: ultra-high"


def test_every_image_has_the_patches_and_tokens_its_layout_says():
    for width, height in [*sides(60, seed=3), (1, 1), (1, 3000), (3000, 1)]:
        for unit in (None, 56):
            layout = images.layout_of(width, height, SMALL, split_unit=unit)
            crops = images.process(noise(width, height), layout, SMALL)
            assert len(crops) == layout.num_crops
            for crop in crops:
                assert crop.num_queries == SMALL.image_sizes[layout.size]
                assert 1 <= len(crop.patches) <= (layout.size // 14) ** 2
                assert len(crop.patches) == len(crop.position_ids)
                assert crop.position_ids.max() < 64


def test_a_strip_keeps_the_smallest_side(released):
    width, height = images.resized_size(1, 3000, 980, 336)
    assert (width, height) == (336, 980)
    image = noise(1, 3000)
    layout = images.layout_of(1, 3000, ARIA)
    output = released(image, max_image_size=980, return_tensors="np")
    assert expect_released(images.process(image, layout, ARIA), output, 980, 256) < 1e-6
    assert images.layout_of(1, 5000, ARIA, split_unit=490).grid is None, "no candidate would keep a pixel of it"


def test_blank_has_the_tokens_of_what_it_replaces():
    layout = images.layout_of(1800, 1200, ARIA, split_unit=490)
    crops = images.blank(layout, ARIA)
    assert [crop.num_queries for crop in crops] == [256] * layout.num_crops
    assert all((crop.patches == 0).all() and len(crop.patches) == 24 * 24 for crop in crops)


def test_patch_size_comes_from_the_configuration():
    vision = VisionConfig(patch_size=7, image_sizes={56: 4}, min_image_size=28, position_grid=8)
    image = noise(56, 40)
    (crop,) = images.process(image, images.layout_of(56, 40, vision), vision)
    assert crop.patches.shape == (6 * 8, 3 * 7 * 7)
    pixels = unpatch(crop, 6, 8, 7)
    np.testing.assert_allclose(pixels[:, :40], np.asarray(image).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert (pixels[:, 40:] == -1).all(), "padded with 0 before normalising"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of files


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_formats_decode_to_rgb_of_the_header_size(format):
    data = encoded(noise(33, 21), format)
    assert images.read_size(data) == (33, 21)
    image = images.decode(data)
    assert (image.mode, image.size) == ("RGB", (33, 21))


def test_cmyk_shows_its_colour():
    red = images.decode(encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=95))
    r, g, b = red.getpixel((5, 5))
    assert r > 230
    assert max(g, b) < 30


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = images.decode(encoded(Image.fromarray(ramp), format))
    expected = np.round(ramp / 257).astype(int)
    assert np.abs(np.asarray(image)[..., 0].astype(int) - expected).max() <= 1
    assert (np.asarray(image)[..., 0] == np.asarray(image)[..., 2]).all()


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 1), (200, 0, 0, 255))
    clear.putpixel((2, 2), (0, 0, 0, 128))
    for data in (encoded(clear), encoded(clear, "WEBP", lossless=True)):
        image = images.decode(data)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 1)) == (200, 0, 0)
        assert 125 <= image.getpixel((2, 2))[0] <= 129
    grey = images.decode(encoded(Image.new("LA", (4, 4), (10, 0))))
    assert grey.getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert images.decode(encoded(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert images.decode(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_bilevel():
    assert images.decode(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert images.decode(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("L", (4, 4), 77), transparency=77)
    assert images.decode(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "green", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
        assert images.read_size(data) == (12, 8)
        r, g, b = images.decode(data).getpixel((3, 3))
        assert r > 240 > 20 > max(g, b)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_counted(format, orientation):
    if format not in Image.SAVE:
        Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 16))  # red in the top left quarter
    stored = upright if orientation not in images._TURNS else upright.transpose(INVERSE[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    assert images.read_size(data) == (64, 32)
    image = images.decode(data)
    assert image.size == (64, 32)
    r, g, b = image.getpixel((16, 8))
    assert r > 200 > 60 > max(g, b)
    assert min(image.getpixel((48, 24))) > 200


INVERSE = images._TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no images


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"Just some text that was saved as photo.png\n", "not an image of a known format"),
        (b"<!DOCTYPE html><html>404</html>", "not an image of a known format"),
        (png_header(20000, 20000), "too large"),
        (png_header(10000, 10000), "too large: 10000 x 10000"),
        (png_header(0, 10), "image"),
        (png_header(100, 100), "damaged"),
        (encoded(noise(200, 200), "JPEG")[:1500], "damaged"),
        (encoded(noise(200, 200), "PNG")[:5000], "damaged"),
        (encoded(noise(200, 200), "GIF")[:3000], "damaged"),
        (encoded(noise(200, 200), "WEBP")[:3000], "damaged"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a known format"),
    ],
)
def test_unusable_bytes_give_one_reason(data, reason):
    with pytest.raises(BadImage, match=reason) as failure:
        images.decode(data)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 200


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_anywhere_is_a_bad_image_or_an_image():
    generator, refused = np.random.default_rng(5), 0
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(noise(40, 30), format)
        for _ in range(40):
            broken = bytearray(data)
            for at in generator.integers(0, min(len(broken), 400), 3):
                broken[at] = generator.integers(0, 256)
            try:
                assert images.decode(bytes(broken)).mode == "RGB"
            except BadImage:
                refused += 1
    assert refused > 50


def test_header_size_agrees_with_decoding_even_for_odd_files():
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(noise(30, 20), "JPEG", exif=exif), encoded(noise(30, 20), "TIFF", exif=exif)):
        assert images.read_size(data) == images.decode(data).size == (20, 30)
