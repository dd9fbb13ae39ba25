"""Pictures and videos of unusual form, and the number of frames that a folder states."""

import io

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlm_jax.pretrained.processing.qwen_hf import _sampler
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.processors.image_text import NaflexInputs, TensorFlowInputs
from vlm_jax.processors.list_format import ListFormatError, from_list_format
from vlm_jax.processors.naflex import interpolate
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import bounded_size
from vlm_jax.processors.split_tiles import SplitViews
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import DeepSeekVL2Views, FixedTilesViews, InternVLViews, Ovis2Views
from vlm_jax.processors.video import (
    FrameSettings,
    MiddleSampler,
    RateSampler,
    SegmentSampler,
    SpreadSampler,
    read_video,
)
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat

from ...advice import tried
from ...memory import peak_bytes


def values(picture) -> list[int]:
    return np.asarray(to_picture(picture, mode="L")).ravel().tolist()


def png(picture, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def test_14_grey_of_32_bits_with_values_of_8_bits():
    assert values(Image.fromarray(np.array([[0, 7, 255]], np.int32))) == [0, 7, 255]
    assert values(Image.fromarray(np.array([[0, 256, 65535]], np.int32))) == [0, 1, 255]
    dark = Image.fromarray(np.array([[0, 200]], np.uint16))
    assert values(png(dark)) == values(dark) == [0, 0]  # of 16 bits, which a file states


def test_14_transparency_of_16_bits():
    """The colour that a tRNS chunk names is blended with white."""
    grey = Image.fromarray(np.array([[1000, 40_000]], np.uint16))
    assert values(png(grey, transparency=1000)) == [255, 40_000 >> 8]
    assert values(_rgb16([(1000, 2000, 3000), (40_000, 40_000, 40_000)], (1000, 2000, 3000))) == [255, 156]


def _rgb16(pixels, clear) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    head = struct.pack(">IIBBBBB", len(pixels), 1, 16, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"tRNS", struct.pack(">3H", *clear)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")
    return PngImagePlugin._MAGIC + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("fit", ["crop", "crop_rounded"])
@pytest.mark.parametrize("size", [(3, 400), (400, 3), (1, 90), (90, 1)])
@pytest.mark.parametrize("edge", [None, 20])
def test_14_a_thin_picture_is_cropped_as_if_all_of_it_were_enlarged(fit, size, edge):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    views = SquareViews(Pixels(), (28, 28), 1, fit, shortest_edge=edge)
    picture = Image.fromarray(pixels)
    short = edge or 28
    long = int(short * max(size) / min(size))
    whole = picture.resize((long, short) if size[1] > size[0] else (short, long), Image.Resampling.BICUBIC)
    left, top = ((side - 28) / 2 for side in whole.size)
    left, top = (round(one) if fit == "crop_rounded" else int(one // 1) for one in (left, top))
    wanted = whole.crop((left, top, left + 28, top + 28))
    difference = np.asarray(views.tile(picture)).astype(int) - np.asarray(wanted)
    assert np.abs(difference).max() <= 1


def video(path, count=48, rate=8, gop=12):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.codec_context.gop_size = 64, 48, gop
        for number in range(count):
            out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (100 + number, 90, 80)))))
        out.mux(stream.encode())
    return path


def test_12_a_video_that_was_cut_without_encoding_it_anew(tmp_path):
    """The packets before the cut are in the file, but hidden by its edit list: what is shown is read."""
    path, cut_path = video(tmp_path / "a.mp4", 24, gop=24), tmp_path / "b.mp4"
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(path)) as source, av.open(str(cut_path), "w", options=options) as out:
        stream = source.streams.video[0]
        copy, cut = out.add_stream_from_template(stream), int(1 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
                out.mux(packet)
    frames, *_ = read_video(cut_path, RateSampler())
    assert len(frames) == 4


# What video_preprocessor_config.json states -> indices of 48 frames at 8 a second, by transformers' sample_frames.
STATED = [
    ({"do_sample_frames": True, "fps": 1.0, "min_frames": 2, "max_frames": 4}, [0, 12, 24, 36]),
    ({"do_sample_frames": True, "num_frames": 6}, [0, 8, 16, 24, 32, 40]),
    ({"do_sample_frames": True, "fps": 1}, [0, 8, 16, 24, 32, 40]),
    ({"fps": 1.0, "min_frames": 2, "max_frames": 4}, [0, 16, 31, 47]),  # spread as qwen-vl-utils does
    ({"do_sample_frames": False, "fps": 1.0}, list(range(48))),
    ({}, [round(47 * i / 11) for i in range(12)]),
]


@pytest.mark.parametrize(("stated", "indices"), STATED)
def test_10_frames_of_a_file_follow_the_folder(stated, indices):
    assert _sampler(stated, "folder").chosen(48, 8.0).tolist() == indices


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"nframes": 6}, 6),
        ({"nframes": 7}, 8),  # halves to even, of pairs
        ({"fps": 1.0}, 6),
        ({"fps": 4, "max_frames": 10}, 10),
        ({"min_frames": 20}, 20),
        ({}, 12),
    ],
)
def test_10_frames_of_an_item(settings, count):
    """As smart_nframes of qwen-vl-utils."""
    chosen = RateSampler().following(FrameSettings(**settings)).chosen(48, 8.0)
    assert len(chosen) == count and (chosen[0], chosen[-1]) == (0, 47)


def test_10_more_frames_than_a_video_has():
    asked = FrameSettings(nframes=50)
    for sampler in (RateSampler(nframes=50), MiddleSampler(50), SpreadSampler()):
        advised = tried("nframes: expected at most the video's {48} frames, got {50}; set nframes or fps in the item")
        with pytest.raises(PictureMismatch, match=advised):
            sampler.following(asked).chosen(48, 8.0)
        for settings in (FrameSettings(nframes=4), FrameSettings(fps=1)):
            assert len(sampler.following(settings).chosen(48, 8.0)) in (4, 6)
    with pytest.raises(PictureMismatch, match="fps: this system samples a number of frames; set nframes instead"):
        SegmentSampler().following(FrameSettings(fps=1.0))


def test_10_middles_of_parts():
    assert MiddleSampler(4).chosen(48, 8.0).tolist() == [6, 18, 30, 42]
    assert MiddleSampler(fps=1.0).chosen(48, 8.0).tolist() == [4, 12, 20, 28, 36, 44]
    assert len(MiddleSampler(4).following(FrameSettings(fps=0.5)).chosen(48, 8.0)) == 3


def test_30_coordinates_of_qwen_vl_are_truncated():
    assert from_list_format([{"box": [[1.9, 2, 3.5, 4.999]]}]) == "<box>(1,2),(3,4)</box>"
    for wrong in ([1, 2, 3], [1, 2, 3, float("nan")], ["1", 2, 3, 4]):
        with pytest.raises(ListFormatError, match="expected a box of four numbers"):
            from_list_format([{"box": [wrong]}])


PIXELS = Pixels()
ANYRES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
THIN_VIEWS = {
    "internvl": InternVLViews(PIXELS, 64, 4),
    "fixed": FixedTilesViews(PIXELS, (336, 336), 576, (2, 2), True),
    "anyres": AnyresViews(SquareViews(PIXELS, (336, 336), 576, "crop"), (24, 24), ANYRES, 336),
    "split": SplitViews(PIXELS, 64, 4, 256),
    "crops": CropViews(SquareViews(PIXELS, (64, 64), 4), min_crop_size=1),
    "ovis2": Ovis2Views(PIXELS, 448, 256),
    "ovis2_port": Ovis2Views(PIXELS, 64, 256, port=True),
    "deepseek_vl2": DeepSeekVL2Views(PIXELS, 384, (14, 14), ((384, 768), (768, 384))),
    "native": NativeViews(PIXELS, PatchFormat(14, 2, 2), bounded_size, 3136, 200_704),
    "naflex": NaflexInputs(PIXELS, 16, 256),
    "naflex_floats": NaflexInputs(PIXELS, 16, 256, floats=True),
    "tensorflow": TensorFlowInputs((224, 224)),
    "tensorflow_crop": TensorFlowInputs((224, 224), "overlap", shortest_edge=256),
}


@pytest.mark.parametrize("name", THIN_VIEWS)
@pytest.mark.parametrize("size", [(300_000, 1), (1, 300_000)])
def test_14_a_thin_picture_costs_what_a_square_one_does(name, size):
    """Of one colour, which it keeps; or it is told that it is too thin."""
    views, picture = THIN_VIEWS[name], Image.new("RGB", size, (255, 255, 255))
    run = views if isinstance(views, NaflexInputs | TensorFlowInputs) else views.images
    made = []
    try:
        assert peak_bytes(lambda: made.append(run([picture]))) < 150 * 2**20
    except CorruptImage as error:
        assert "too thin" in str(error) and name == "ovis2"
        return
    (made,) = made
    pixels = made[0].pixels if isinstance(made, list) else made.patches if name.startswith("naflex") else made
    if name not in ("anyres", "ovis2", "deepseek_vl2", "naflex", "naflex_floats"):  # which pad
        assert (np.asarray(pixels) == 1).all()


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_antialias", "overlap"])
@pytest.mark.parametrize("size", [(40, 7), (5, 90)])
def test_14_blocks_of_a_large_picture_are_those_of_the_whole(monkeypatch, kind, size):
    image = np.random.default_rng(0).integers(0, 255, (61, 83, 3), np.uint8).astype(np.float32)
    whole = interpolate(image, size, kind)
    monkeypatch.setattr("vlm_jax.processors.naflex._MAX_VALUES", 1)
    monkeypatch.setattr("vlm_jax.processors.naflex._REACH", 16)
    np.testing.assert_allclose(interpolate(image, size, kind), whole, atol=1e-3)
    part = interpolate(image, size, kind, window=((1, 4), (2, 6)))
    np.testing.assert_allclose(part, whole[1:4, 2:6], atol=1e-3)


def test_14_a_large_transparent_picture_is_blended_in_bands(monkeypatch):
    """Bit for bit as at once, in the memory of the result and a few bands."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 4), np.uint8)
    whole = np.asarray(to_picture(Image.fromarray(pixels)))
    monkeypatch.setattr("vlm_jax.processors.image._CHUNK", 500)
    np.testing.assert_array_equal(np.asarray(to_picture(Image.fromarray(pixels))), whole)
    white = Image.new("RGBA", (30, 40), (255, 255, 255, 255))
    wanted = Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB")
    np.testing.assert_array_equal(whole, np.asarray(wanted))
    monkeypatch.undo()
    large = Image.new("RGBA", (4000, 3000), (1, 2, 3, 4))
    assert peak_bytes(lambda: to_picture(large)) < 4000 * 3000 * 3 + 60 * 2**20
