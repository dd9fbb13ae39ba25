"""Images: every mode that Pillow writes, against pixels known beforehand, and files that are broken."""

import inspect
import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from vlm_jax.processors.image import (
    FILTERS,
    FIXED_POINT,
    CorruptImage,
    image_size,
    normalize,
    open_image,
    resize_in_fixed_point,
    to_channels,
    to_picture,
)
from vlm_jax.processors.pixels import Pixels


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_and_grey_are_read_as_they_are(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(Image.fromarray(RGB)))
    np.testing.assert_array_equal(open_image(path), RGB)
    np.testing.assert_array_equal(open_image(str(path)), RGB)
    grey = saved(Image.fromarray(RGB[:, :, 0]))
    np.testing.assert_array_equal(open_image(grey, channels=1), RGB[:, :, :1])
    np.testing.assert_array_equal(open_image(grey, channels=3), np.repeat(RGB[:, :, :1], 3, axis=2))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: to be turned a quarter clockwise
    np.testing.assert_array_equal(open_image(saved(Image.fromarray(RGB), exif=exif)), np.rot90(RGB, k=-1))


def test_a_palette_is_resolved():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([1, 0])
    assert open_image(saved(picture)).tolist() == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize(("kind", "pixels"), [(2, [[[3, 2, 1], [6, 5, 4]]]), (3, [[[1, 1, 1], [2, 2, 2]]])])
def test_a_map_of_colours_is_not_for_pixels_that_are_no_indices(kind, pixels):
    """The TGA format allows a map in files of true colour (2) and of grey (3), where it has no effect."""
    depth = {2: 24, 3: 8}[kind]
    header = struct.pack("<BBBHHBHHHHBB", 0, 1, kind, 0, 4, 24, 0, 0, 2, 1, depth, 0x20)
    data = header + bytes(range(100, 112)) + (b"\1\2\3\4\5\6" if kind == 2 else b"\1\2")
    assert open_image(data).tolist() == pixels
    assert np.asarray(to_picture(data)).tolist() == pixels
    assert np.asarray(to_picture(Image.open(io.BytesIO(data)))).tolist() == pixels


def test_transparency_is_laid_over_white():
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    pixels = open_image(saved(Image.fromarray(rgba)))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    # Black at alpha 128/255 over white leaves 255 * (1 - 128/255) = 127.
    assert pixels[0, 2].tolist() == [127, 127, 127]


def test_a_transparent_palette_colour_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([1, 0])
    assert open_image(saved(picture, transparency=0)).tolist() == [[[200, 100, 50], [255, 255, 255]]]


def test_sixteen_bits_keep_the_upper_eight():
    deep = np.array([[0, 255, 256, 65535, 0x1234]], np.uint16)
    assert open_image(saved(Image.fromarray(deep)), channels=1)[0, :, 0].tolist() == [0, 0, 1, 255, 0x12]


def test_one_bit_is_black_and_white():
    picture = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert open_image(saved(picture), channels=1)[0, :, 0].tolist() == [0, 255, 0]


def test_cmyk_becomes_rgb():
    # Full cyan ink takes all red away; no ink at all is white.
    picture = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 0]]], np.uint8), mode="CMYK")
    assert open_image(saved(picture, "TIFF")).tolist() == [[[0, 255, 255], [255, 255, 255]]]


def turned(degrees):
    exif = Image.Exif()
    exif[0x0112] = degrees
    return {"exif": exif}


@pytest.mark.parametrize(
    ("picture", "kind", "options", "pixels"),
    [
        (Image.fromarray(RGB), "PNG", turned(8), np.rot90(RGB)),
        (Image.fromarray(RGB), "TIFF", turned(2), RGB[:, ::-1]),
        (Image.fromarray(RGB[:, :, 0]), "PNG", {}, np.repeat(RGB[:, :, :1], 3, axis=2)),
        (Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 256 + 7), "PNG", {}, np.repeat(RGB[:, :, :1], 3, axis=2)),
        (Image.fromarray(255 - RGB).convert("CMYK"), "TIFF", {}, 255 - RGB),
        (Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)]), "PNG", {}, [[[224] * 3]]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "WEBP", {"lossless": True}, [[[255] * 3]]),
        (Image.new("1", (1, 1), 1), "PNG", {}, [[[255] * 3]]),
    ],
)
def test_every_kind_reaches_released_systems_in_rgb(picture, kind, options, pixels):
    """As a file, and as the image that Pillow opened, which is not upright by itself."""
    data = saved(picture, kind, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        found = to_picture(source)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), pixels)


def test_luma_weighs_red_green_and_blue_as_itu_601():
    pure = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    expected = 255 * np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(to_channels(pure, 1)[0, :, 0], expected, atol=1.0)
    assert to_channels(pure, 3) is pure
    with pytest.raises(ValueError, match=r"1 or 3 channels, got an image of shape \(1, 3, 3\) to convert to 4"):
        to_channels(pure, 4)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b"", "UnidentifiedImageError: unknown image format"),
        (EPS, "UnidentifiedImageError: unknown image format; expected one of AVIF, "),
        (b"<html>not found</html>", "UnidentifiedImageError: unknown image format"),
        (saved(Image.fromarray(RGB), "BMP")[:-20], "OSError: .*truncated"),
        (png_header(8, 8), "OSError: .*truncated"),
        (
            png_header(8_000, 20_000),
            "DecompressionBombWarning|20000x8000 pixels, more than max_pixels=100000000",
        ),
        (png_header(30_000, 30_000), "DecompressionBombError"),
        (saved(Image.fromarray(RGB.astype(np.float32)[:, :, 0]), "TIFF"), "unknown range"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, broken, why):
    path = tmp_path / "broken.png"
    path.write_bytes(broken)
    with pytest.raises(CorruptImage, match=rf"broken\.png: .*({why})"):
        open_image(path)
    with pytest.raises(CorruptImage, match=f"record 7: .*({why})"):
        open_image(broken, name="record 7")


def test_no_program_is_started_for_a_picture(monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    for read in (open_image, image_size, to_picture):
        with pytest.raises(CorruptImage, match="unknown image format"):
            read(EPS)


def test_an_image_over_the_limit_is_refused_and_one_at_the_limit_is_not():
    data = saved(Image.fromarray(RGB))
    assert open_image(data, max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(CorruptImage, match="bytes: its header claims 5x7 pixels, more than max_pixels=34"):
        open_image(data, max_pixels=34)


def test_a_missing_file_is_no_corrupt_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        open_image(tmp_path / "absent.png")


@pytest.mark.parametrize("name", sorted(FILTERS))
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_equals_pillow(name, channels):
    image = np.random.default_rng(1).integers(0, 256, (20, 31, channels), dtype=np.uint8)
    pixels = Pixels((0.0,) * channels, (1.0,) * channels, FILTERS[name])
    resized = pixels.array(pixels.resized(to_picture(image, mode="L" if channels == 1 else "RGB"), (9, 40)))
    assert resized.shape == (9, 40, channels)
    for channel in range(channels):
        picture = Image.fromarray(image[:, :, channel]).resize((40, 9), getattr(Image.Resampling, name.upper()))
        np.testing.assert_array_equal(resized[:, :, channel], np.asarray(picture))


def test_the_box_filter_halves_by_averaging_four_pixels():
    image = Image.fromarray(np.array([[0, 100], [200, 20]], np.uint8))
    pixels = Pixels((0.0,), (1.0,), FILTERS["box"])
    assert pixels.array(pixels.resized(image, (1, 1))).tolist() == [[[80]]]
    assert pixels.resized(image, (2, 2)) is image


@pytest.mark.parametrize("kind", FIXED_POINT)
@pytest.mark.parametrize("size", [(9, 17), (20, 13), (33, 40), (20, 31)])
def test_resizing_in_fixed_point_is_near_pillow(kind, size):
    """Torch itself is met in tests/parity."""
    image = np.random.default_rng(1).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    resized = resize_in_fixed_point(image, size, kind)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], kind)).astype(int)
    assert resized.dtype == np.uint8 and np.abs(resized - expected).max() <= 2


def test_columns_are_rounded_before_rows():
    """Weights 3/7, 3/7, 1/7, 0: 255 * 3/7 is rounded to 109, and 109 * 3/7 to 47; 255 * 9/49 would be 46.8."""
    image = np.zeros((4, 4, 1), np.uint8)
    image[0, 0] = 255
    assert resize_in_fixed_point(image, (2, 2), Image.Resampling.BILINEAR)[..., 0].tolist() == [[47, 0], [0, 0]]
    image[0, 0], image[0, 2] = 0, 255  # 36.4 and 109.3, then 15.4 (15.6 unrounded) and 46.7
    assert resize_in_fixed_point(image, (2, 2), Image.Resampling.BILINEAR)[..., 0].tolist() == [[15, 47], [0, 0]]


def test_pixels_are_rescaled_and_normalised_per_channel():
    image = np.array([[[0, 51, 255]]], np.uint8)
    values = normalize(image, mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [[[-1.0, 0.0, 0.5]]], atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 0, 1)])
def test_a_picture_without_pixels_is_named(shape):
    height, width = shape[:2]
    for source in (np.zeros(shape, np.uint8), Image.new("RGB", (width, height))):
        with pytest.raises(CorruptImage, match=f"image 3: expected pixels, got none in {height}x{width}"):
            to_picture(source, name="image 3")


@pytest.mark.parametrize(("source", "told"), [(None, "None"), (["a.png"], "a value of type list"), (3, "type int")])
def test_what_is_no_picture_is_named(source, told):
    call = inspect.unwrap(to_picture)  # without the checks of types, which are before it in tests
    with pytest.raises(CorruptImage, match=f"image 3: expected a file's path or bytes, .* got .*{told}"):
        call(source, name="image 3")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_header_has_the_size_of_the_upright_picture(form, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, form, exif=exif)
    assert image_size(file.getvalue()) == open_image(file.getvalue()).shape[:2]


@pytest.mark.parametrize("stated", ["6", 9, 0])
def test_an_orientation_that_is_none_is_upright(monkeypatch, stated):
    """A damaged entry of EXIF has any type."""
    source = saved(Image.fromarray(RGB), "JPEG", quality=100, exif=Image.Exif())
    monkeypatch.setattr(Image.Exif, "get", lambda *_: stated)
    assert image_size(source) == (5, 7)
    assert open_image(source).shape == (5, 7, 3)


def test_a_png_may_state_its_orientation_as_xmp():
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "PNG", pnginfo=entries)
    assert image_size(file.getvalue()) == open_image(file.getvalue()).shape[:2] == (40, 20)
