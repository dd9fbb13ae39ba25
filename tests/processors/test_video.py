"""Videos that are made here: which frames are taken, and errors."""

import fractions
import io
import logging
import re
import struct

import av
import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors import video as video_module
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.tiles import InternVLViews
from vlm_jax.processors.video import (
    EveryFrame,
    FrameSettings,
    MiddleSampler,
    RateSampler,
    SegmentSampler,
    SpreadSampler,
    read_video,
    uniform_frames,
    video_size,
)
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat

from ..advice import tried
from .test_processor import processor, say


def video(num_frames, fps, size=(32, 48), codec="libx264", form="mp4", title=""):
    """Frame i is grey of level 8 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fractions.Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 8 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def levels(frames):
    return [round(float(np.asarray(frame).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("num_frames", "video_fps", "expected"),
    [
        (30, 10, [0, 6, 12, 17, 23, 29]),  # 3 seconds at 2 frames each
        (10, 10, [0, 3, 6, 9]),  # no fewer than 4
        (3, 10, [0, 2]),  # no more than there are, in pairs
        (1, 10, [0]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(num_frames, video_fps, expected):
    assert RateSampler().chosen(num_frames, video_fps).tolist() == expected


def test_a_long_video_has_no_more_than_the_most():
    chosen = RateSampler(max_frames=8).chosen(1000, 10)
    np.testing.assert_array_equal(chosen, np.rint(np.linspace(0, 999, 8)))


@pytest.mark.parametrize("as_path", [False, True])
def test_a_file_gives_the_chosen_frames_and_their_rate(tmp_path, as_path):
    source = video(30, 10)
    if as_path:
        (tmp_path / "v.mp4").write_bytes(source)
        source = tmp_path / "v.mp4"
    frames, fps, *_ = read_video(source, RateSampler())
    assert levels(frames) == [0, 6, 12, 17, 23, 29]
    assert frames[0].size == (48, 32)
    assert fps == pytest.approx(2.0)


def test_a_conversation_about_a_file_is_timed():
    views = NativeViews(Pixels(), PatchFormat(4, 2, 2), qwen_size, 64, 4096, rotary_3d=True, tokens_per_second=10.0)
    batch = processor(views, rotary_3d=True)(say("<video>", "a"), videos=[video(30, 10)])
    times = batch.positions[0, :, 0][batch.visual_index[0] >= 0] - 1  # after the beginning
    assert sorted(set(times.tolist())) == [0, 10, 20]  # pairs of frames, a second each
    assert batch.images.segment_ids.max() == 3


@pytest.mark.parametrize(("num_frames", "segments"), [(100, 8), (33, 32), (5, 8), (1, 3)])
def test_segments_give_their_middle_frames(num_frames, segments):
    """As the model cards of InternVL compute them, one by one."""
    length = float(num_frames - 1) / segments
    expected = [int(0 + length / 2 + np.round(length * index)) for index in range(segments)]
    chosen = SegmentSampler(segments).chosen(num_frames, 30)
    np.testing.assert_array_equal(chosen, expected)
    assert chosen.min() >= 0 and chosen.max() < num_frames


def test_frames_that_are_chosen_twice_are_there_twice():
    frames, *_ = read_video(video(3, 10), SegmentSampler(6))
    chosen = SegmentSampler(6).chosen(3, 10)
    assert levels(frames) == chosen.tolist() and len(set(levels(frames))) < 6


def turned(file, degrees):
    """The file with a matrix in its track header that shows it turned clockwise. Source: ISO/IEC 14496-12, 8.3.2."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    start = file.index(b"tkhd") + 4 + 4 + 5 * 4 + 2 * 4 + 4 * 2
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    return file[:start] + matrix + file[start + 36 :]


@pytest.mark.parametrize("degrees", [0, 90])
def test_the_size_of_a_file_is_that_of_its_frames(degrees):
    source = turned(video(30, 10), degrees)
    frames, *_ = read_video(source, RateSampler())
    assert video_size(source, RateSampler())[:3] == (len(frames), frames[0].height, frames[0].width)
    with pytest.raises(CorruptImage, match=r"clip: its frames have 32x48 pixels, more than max_pixels=9"):
        video_size(source, RateSampler(), max_pixels=9, name="clip")
    with pytest.raises(CorruptImage, match="clip: "):
        video_size(source[:100], RateSampler(), name="clip")


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_is_shown_as_its_file_says(degrees):
    buffer = io.BytesIO()
    corner = np.zeros((32, 48, 3), np.uint8)
    corner[:16, :16] = 255  # white above at the left
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(corner, format="rgb24")))
        container.mux(stream.encode())
    frames, *_ = read_video(turned(buffer.getvalue(), degrees), RateSampler())
    expected = np.rot90(corner, k=-degrees // 90)  # counterclockwise
    assert frames[0].size == expected.shape[1::-1]
    np.testing.assert_allclose(np.asarray(frames[0]), expected, atol=12)


def test_a_file_is_sampled_as_the_argument_says():
    made = processor(InternVLViews(Pixels(), 4, 1), {"video": "<video>"}, frame_sampler=SegmentSampler(4))
    for options, count in (
        ({}, 4),
        ({"frame_sampler": SegmentSampler(2)}, 2),
        ({"frame_sampler": RateSampler()}, 6),
    ):
        assert made(say("<video>"), videos=[video(30, 10)], **options).images.shape[1] == count


def test_what_is_no_video_is_named():
    with pytest.raises(CorruptImage, match="video: InvalidDataError"):
        read_video(b"no video at all", RateSampler())
    with pytest.raises(FileNotFoundError):
        read_video("/nowhere/v.mp4", RateSampler())
    with pytest.raises(CorruptImage, match="frames have 32x48 pixels, more than max_pixels=100"):
        read_video(video(4, 10), RateSampler(), max_pixels=100)
    still = io.BytesIO()
    Image.new("RGB", (8, 8)).save(still, "PNG")
    assert len(read_video(still.getvalue(), RateSampler())[0]) == 1


def test_a_later_frame_has_bounds_too():
    """A size may change within a stream; what a header tells is no bound of the memory."""
    changing = b"".join(video(4, 10, size, "mpeg2video", "mpegts") for size in ((32, 48), (64, 96)))
    frames, *_ = read_video(changing, SegmentSampler(2))
    assert {frame.size for frame in frames} == {(48, 32), (96, 64)}
    with pytest.raises(CorruptImage, match="Invalid"):
        read_video(changing, SegmentSampler(2), max_pixels=64 * 96 - 1)


SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 40400 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


@pytest.mark.parametrize(
    "text",
    [
        b"ffconcat version 1.0\nfile secret.png\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.png\n#EXT-X-ENDLIST\n",
        b"secret.png\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
        SDP,
    ],
    ids=["concat", "playlist", "path", "dash", "session"],
)
def test_a_text_that_names_other_files_or_the_network_is_no_video(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("secret.png")
    (tmp_path / "v.mp4").write_bytes(text)
    for source in (text, tmp_path / "v.mp4"):
        with pytest.raises(CorruptImage, match="expected a container of the kinds asf, avi"):
            read_video(source, RateSampler())
        with pytest.raises(CorruptImage, match="expected a container of the kinds asf, avi"):
            video_size(source, RateSampler())


@pytest.mark.parametrize("form", ["mp4", "mov", "matroska", "avi", "mpegts", "flv", "asf"])
def test_usual_containers_are_read(form):
    source = video(6, 5, codec="mpeg4" if form in ("avi", "asf") else "libx264", form=form)
    assert levels(read_video(source, RateSampler(min_frames=6))[0]) == list(range(6))


def test_a_codec_without_a_decoder_is_named():
    source = video(4, 10, codec="mpeg4", form="avi").replace(b"FMP4", b"ZZZZ")
    with pytest.raises(CorruptImage, match="video: no decoder for the codec of its video"):
        read_video(source, RateSampler())


def test_titles_in_another_encoding_are_ignored():
    source = video(4, 10, title="TITLE").replace(b"TITLE", b"\xff\xfe\xfd\xfc\xfb")
    assert levels(read_video(source, RateSampler())[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(8, 8, list(range(8))), (8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (2, 4, [0, 0, 1, 1]), (1, 2, [0, 0])],
)
def test_uniform_frames_are_the_middles_of_equal_parts(count, wanted, expected):
    assert uniform_frames(count, wanted) == expected


@pytest.mark.parametrize("read", [read_video, video_size])
def test_frames_that_memory_does_not_hold_are_refused_before_they_are_decoded(monkeypatch, read):
    source = video(6, 10)
    monkeypatch.setattr(video_module, "MAX_VIDEO_PIXELS", 4 * 32 * 48)
    assert read(source, SegmentSampler(4))  # as many as are held
    told = tried(
        "its {6} selected frames of {32}x{48} pixels have more than {6144} pixels, all of which are held; select fewer"
    )
    with pytest.raises(CorruptImage, match=told):
        read(source, RateSampler(min_frames=6))
    assert read(source, RateSampler(min_frames=6).following(FrameSettings(nframes=4)))
    assert read(source, RateSampler(min_frames=2, max_frames=4).following(FrameSettings(max_frames=4)))
    assert read(video(6, 10, size=(16, 24)), RateSampler(min_frames=6))  # a smaller one
    assert read(video(2, 10), SegmentSampler(40))  # a repeated frame is held once


def test_every_frame_is_read_and_told_once(caplog):
    video_module._tell_every_frame.cache_clear()
    sampler = EveryFrame(MiddleSampler(4))
    with caplog.at_level(logging.WARNING):
        frames, rate, *_ = read_video(video(5, 10), sampler)
        read_video(video(3, 10), sampler)
    assert (levels(frames), rate) == (list(range(5)), 10)
    (told,) = [record.message for record in caplog.records if "every frame" in record.message]
    assert re.search(tried("is false; set nframes or fps in the item to sample frames"), told)
    assert len(sampler.chosen(768, 10)) == 768
    advised = tried("do_sample_frames is false and all frames are read, got {769}; set nframes or fps in the item")
    with pytest.raises(PictureMismatch, match=f"expected at most 768 frames.*{advised}"):
        sampler.chosen(769, 10)
    assert len(sampler.following(FrameSettings(nframes=8)).chosen(769, 10)) == 8
    assert len(sampler.following(FrameSettings(fps=1)).chosen(769, 10)) == 76


def test_settings_of_a_video_sample_its_frames_where_a_folder_does_not():
    sampler = EveryFrame(MiddleSampler(4))
    assert sampler.following(FrameSettings()) is sampler
    assert sampler.following(FrameSettings(nframes=2)).chosen(48, 8.0).tolist() == [12, 36]
    assert sampler.following(FrameSettings(fps=1)).chosen(48, 8.0).tolist() == [4, 12, 20, 28, 36, 44]


@pytest.mark.parametrize(("settings", "count"), [({"fps": 2}, 8), ({"max_frames": 3}, 3), ({"nframes": 5}, 5)])
def test_a_spread_sampler_has_no_minimum(settings, count):
    with pytest.raises(
        PictureMismatch, match=tried("this system has no minimum of frames; set fps, max_frames or nframes")
    ):
        SpreadSampler().following(FrameSettings(min_frames=4))
    assert len(SpreadSampler().following(FrameSettings(**settings)).chosen(40, 10.0)) == count
