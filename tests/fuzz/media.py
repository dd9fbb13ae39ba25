"""Pictures and videos: valid files of every kind, changed."""

import fractions
import functools
import io
import random

import av
import numpy as np
from PIL import ExifTags, Image

from tests.fuzz.mutation import changed_bytes
from tests.fuzz.target import Target
from vlm_jax.processors.image import CorruptImage, image_size, open_image, to_picture
from vlm_jax.processors.video import RateSampler, SegmentSampler, read_video, video_size

HEADS = (
    *(
        b"ffconcat version 1.0\nfile ",
        b"#EXTM3U\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"RIFF",
    ),
    *(
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"II*\x00",
        b"MM\x00*",
        b"P6\n9 9\n255\n",
        b"P5\n99999 99999 ",
    ),
    *(
        b"\x1aE\xdf\xa3",
        b"\x00\x00\x00\x18ftypmp42",
        b"8BPS",
        b"qoif",
        b"<svg/>",
        b"FLV\x01",
        b"OggS",
        b"\x00\x00\x01\xba",
    ),
)
PIXELS = 4_000_000


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Files of every format and mode that Pillow writes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 17, 4), dtype=np.uint8)
    found = []
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
        picture = (
            Image.fromarray(pixels).convert("L" if mode == "I;16" else mode if mode != "PA" else "P").convert(mode)
        )
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        for kind in (
            "PNG",
            "JPEG",
            "WEBP",
            "GIF",
            "BMP",
            "TIFF",
            "PPM",
            "ICO",
            "JPEG2000",
            "TGA",
            "PCX",
            "SGI",
            "AVIF",
            "QOI",
        ):
            for options in ({}, {"exif": exif}, {"progressive": True}, {"compression": "tiff_lzw"}, {"rle": True}):
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, kind, **options)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # this format has not this mode
                if buffer.getvalue() not in found:
                    found.append(buffer.getvalue())
    frames = [Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels[::-1, :, :3])]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        found.append(buffer.getvalue())
    return tuple(found)


@functools.cache
def videos() -> tuple[bytes, ...]:
    """Files of the usual containers and codecs."""
    found = []
    for form, codec in (
        *(("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libx264"), ("avi", "mpeg4"), ("avi", "mjpeg")),
        *(("webm", "libvpx"), ("mpegts", "mpeg2video"), ("flv", "flv"), ("asf", "mpeg4"), ("gif", "gif")),
    ):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as container:
            stream = container.add_stream(codec, rate=fractions.Fraction(10))
            stream.height, stream.width, stream.pix_fmt = (
                32,
                48,
                {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p"),
            )
            container.metadata["title"] = "a title"
            for number in range(6):
                frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * number, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        found.append(buffer.getvalue())
    return tuple(found)


def _changed(rng: random.Random, files: tuple[bytes, ...]) -> bytes:
    data = changed_bytes(rng, rng.choice(files))
    return data if rng.random() < 0.95 else rng.choice(HEADS) + data[rng.randrange(64) :]


def _read_picture(data: bytes) -> None:
    try:
        size = image_size(data, max_pixels=PIXELS)
    except CorruptImage:
        size = None
    pixels = open_image(data, max_pixels=PIXELS)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    picture = to_picture(data, max_pixels=PIXELS)
    np.testing.assert_array_equal(np.asarray(picture), pixels)
    assert size is not None, "the header of a picture that can be read"


def _read_video(data: bytes) -> None:
    sampler = SegmentSampler(3) if data[-1:] < b"\x80" else RateSampler(max_frames=4)
    frames, fps, *_ = read_video(data, sampler, max_pixels=PIXELS)
    assert frames and fps > 0
    assert video_size(data, sampler, max_pixels=PIXELS)[0] == len(frames)


TARGETS = {
    "pictures": Target(lambda rng: _changed(rng, pictures()), _read_picture, (CorruptImage,)),
    "videos": Target(lambda rng: _changed(rng, (*videos(), *pictures()[:3])), _read_video, (CorruptImage,)),
}
