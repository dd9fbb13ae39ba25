"""Videos: frame sampling and decoding."""

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlm_jax.paths import regular
from vlm_jax.processors.image import CorruptImage, resolved
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import Fields, VideoSize

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FrameSettings:
    """Settings of the frames of one video; None for the processor's.

    Attributes:
      fps: sampled frames per second, or those of a video that is given as frames.
      nframes: number of sampled frames.
      min_frames, max_frames: limits of the number at `fps`.

    Raises:
      PictureMismatch: values that exclude each other.
    """

    fps: float | int | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    def __post_init__(self):
        others = [name for name in ("fps", "min_frames", "max_frames") if getattr(self, name) is not None]
        if self.nframes is not None and others:
            raise PictureMismatch(f"nframes excludes {others[0]}; pass one of the two")
        if self.min_frames and self.max_frames and self.min_frames > self.max_frames:
            raise PictureMismatch(f"min_frames={self.min_frames} is more than max_frames={self.max_frames}")


def check_rate(fps: object) -> None:
    """Raises a `PictureMismatch` unless a frame rate is a finite number above 0."""
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
        raise PictureMismatch(f"fps: expected a number of frames per second above 0, got {fps!r}")


MAX_FRAMES = 768  # of a video whose frames are all read
MAX_VIDEO_PIXELS = 1 << 31  # of the selected frames of a video, as in 1000 of 1080x1920
# A later frame may be larger than the header tells, by this factor of its pixels or up to 4K.
MAX_CHANGE, LARGE_FRAME = 4, 3840 * 2160
# FFmpeg's names of containers of one file. Others, such as playlists and descriptions of sessions, make FFmpeg open
# other files and the network.
CONTAINERS = (
    *("asf", "avi", "flv", "matroska", "mov", "mp4", "mpeg", "mpegts", "ogg", "webm"),
    *("apng", "gif", "jpeg_pipe", "png_pipe", "webp_pipe"),  # pictures, as videos of their frames
)


@runtime_checkable
class FrameSampler(Protocol):
    """Selects frames of a video."""

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames, in order; frames may be repeated.

        Args:
          num_frames: of the video.
          video_fps: its frames per second.

        Raises:
          PictureMismatch: it has fewer frames than are wanted.
        """
        ...

    def following(self, settings: FrameSettings) -> "FrameSampler":
        """The sampler with a video's own settings.

        Raises:
          PictureMismatch: it has no such setting.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RateSampler:
    """A number of frames per second, evenly spaced from the first to the last: Qwen2-VL, Ovis 2.5.

    Attributes:
      fps: sampled frames per second.
      min_frames: minimum, for a video with at least as many.
      max_frames: maximum.
      multiple: the number is rounded down to a multiple of this.
      nframes: the number itself, for any length, rounded to a multiple; None for `fps`.
      first_of_parts: selects the first frame of each of equal parts, as transformers' video processors do.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; qwen-vl-utils, vision_process.py, smart_nframes; transformers,
    models/qwen2_vl/video_processing_qwen2_vl.py, sample_frames.
    """

    fps: float | int = 2.0
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 2
    nframes: int | None = None
    first_of_parts: bool = False

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        if self.nframes is not None:
            count = max(round(self.nframes / self.multiple) * self.multiple, 1)
            if count > num_frames:
                raise _too_few(num_frames, self.nframes)
        else:
            least = math.ceil(self.min_frames / self.multiple) * self.multiple
            wanted = min(max(num_frames / video_fps * self.fps, least), self.max_frames, num_frames)
            count = max(math.floor(wanted / self.multiple) * self.multiple, 1)
        if self.first_of_parts:
            return np.arange(count) * num_frames // count
        return np.rint(np.linspace(0, num_frames - 1, count)).astype(int)

    def following(self, settings: FrameSettings) -> "RateSampler":
        """See `FrameSampler`."""
        given = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
        if given and "nframes" not in given:
            given["nframes"] = None  # a rate takes precedence over the processor's number
        found = dataclasses.replace(self, **given)
        if found.min_frames > found.max_frames:  # one of an item, and the other of the processor
            limit: Fields = {"min_frames": 1} if settings.min_frames is None else {"max_frames": found.min_frames}
            found = dataclasses.replace(found, **limit)
        return found


@dataclasses.dataclass(frozen=True)
class SegmentSampler:
    """The middle frame of each of `num_segments` equal parts, for any length: InternVL.

    Attributes:
      num_segments: number of parts; frames of a shorter video are repeated.

    Source: OpenGVLab's model cards of InternVL 2 and 2.5, get_index and load_video, without a `bound`.
    """

    num_segments: int = 32

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        del video_fps
        length = (num_frames - 1) / self.num_segments
        return (length / 2 + np.round(length * np.arange(self.num_segments))).astype(int)

    def following(self, settings: FrameSettings) -> "SegmentSampler":
        """See `FrameSampler`."""
        for name in ("fps", "min_frames", "max_frames"):
            if getattr(settings, name) is not None:
                raise PictureMismatch(f"{name}: this system samples a number of frames; set nframes instead")
        return self if settings.nframes is None else SegmentSampler(settings.nframes)


@dataclasses.dataclass(frozen=True)
class MiddleSampler:
    """The middle frame of each of equal parts, at most as many as the video has: InternVL of transformers.

    Attributes:
      nframes: number of parts; None for `fps`.
      fps: parts per second.

    Source: transformers, models/internvl/video_processing_internvl.py, sample_frames.
    """

    nframes: int | None = None
    fps: float | int = 1.0

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        count = max(int(num_frames / video_fps * self.fps), 1) if self.nframes is None else self.nframes
        if count > num_frames:
            raise _too_few(num_frames, count)
        return np.asarray(uniform_frames(num_frames, count))

    def following(self, settings: FrameSettings) -> "MiddleSampler":
        """See `FrameSampler`."""
        for name in ("min_frames", "max_frames"):
            if getattr(settings, name) is not None:
                raise PictureMismatch(f"{name}: this system samples a number of frames; set nframes or fps instead")
        if settings.fps is not None:
            return MiddleSampler(fps=settings.fps)
        return self if settings.nframes is None else MiddleSampler(settings.nframes)


@dataclasses.dataclass(frozen=True)
class SpreadSampler:
    """A number of frames per second up to a maximum, spread from the first to the last: SmolVLM.

    Of a video that is longer than the maximum takes, the first and the last second are skipped.

    Attributes:
      fps: sampled frames per second.
      max_frames: maximum.
      nframes: the number itself, for any length; None for `fps`.

    Source: transformers, models/smolvlm/video_processing_smolvlm.py, sample_frames, whose maximum is multiplied by the
    rate where a length in seconds is compared with it.
    """

    fps: float | int = 1.0
    max_frames: int = 64
    nframes: int | None = None

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        duration, last = num_frames / video_fps, num_frames - 1
        count = max(min(round(self.fps * duration), self.max_frames), 1)
        start, stop = 0, last
        if self.nframes is not None:
            if self.nframes > num_frames:
                raise _too_few(num_frames, self.nframes)
            count = self.nframes
        elif duration - 2 > self.max_frames * self.fps:
            start, stop = int(video_fps), min(int(num_frames - video_fps), last)
        if start >= stop:
            start, stop = 0, last
        return np.unique(np.linspace(start, stop, count, dtype=int))

    def following(self, settings: FrameSettings) -> "SpreadSampler":
        """See `FrameSampler`."""
        if settings.min_frames is not None:
            raise PictureMismatch("min_frames: this system has no minimum of frames; set fps, max_frames or nframes")
        given = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
        return dataclasses.replace(self, **given)


@dataclasses.dataclass(frozen=True)
class SecondSampler:
    """The first frame of every second; of a longer video a number of frames, spread over it: MiniCPM-V 4.6.

    Attributes:
      max_frames: maximum; of a video of more seconds, as many of the frames at every tenth of a second.

    Source: transformers, models/minicpmv4_6/video_processing_minicpmv4_6.py, sample_frames.
    """

    max_frames: int = 128

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        duration = num_frames / video_fps
        times = [float(second) for second in range(math.ceil(duration))]
        if duration > self.max_frames:
            tenths = [round(number * 0.1, 1) for number in range(int(duration / 0.1))]
            few = np.linspace(0, len(tenths) - 1, min(self.max_frames, len(tenths)), dtype=int)
            times = [tenths[number] for number in few]
        return np.asarray([min(int(time * video_fps), num_frames - 1) for time in times])

    def following(self, settings: FrameSettings) -> "SecondSampler":
        """See `FrameSampler`."""
        for name in ("fps", "nframes", "min_frames"):
            if getattr(settings, name) is not None:
                raise PictureMismatch(f"{name}: this system samples a frame a second; set max_frames instead")
        return self if settings.max_frames is None else SecondSampler(settings.max_frames)


@dataclasses.dataclass(frozen=True)
class EveryFrame:
    """All frames of a video: the video processors of transformers where `do_sample_frames` is false.

    Attributes:
      sampler: selects frames of a video that has settings of its own.

    Source: transformers, video_processing_utils.py, _decode_and_sample_videos.
    """

    sampler: FrameSampler

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        del video_fps
        _tell_every_frame()
        if num_frames > MAX_FRAMES:
            raise PictureMismatch(
                f"expected at most {MAX_FRAMES} frames, since the folder's do_sample_frames is false and all frames "
                f"are read, got {num_frames}; set nframes or fps in the item"
            )
        return np.arange(num_frames)

    def following(self, settings: FrameSettings) -> "FrameSampler":
        """See `FrameSampler`; with a setting, frames are sampled."""
        return self if settings == FrameSettings() else self.sampler.following(settings)


@functools.cache  # once a process
def _tell_every_frame() -> None:
    _log.warning(
        "every frame of a video is read, since do_sample_frames of the folder's video processor is false; set nframes "
        "or fps in the item to sample frames"
    )


def _too_few(num_frames: int, wanted: int) -> PictureMismatch:
    """The error for a video that is shorter than the frames that an item, or the release by default, wants."""
    return PictureMismatch(
        f"nframes: expected at most the video's {num_frames} frames, got {wanted}; set nframes or fps in the item"
    )


class Clip(NamedTuple):
    """The sampled frames of a video.

    Attributes:
      frames: in order.
      fps: their number per second.
      times: of each frame, in seconds from the start.
      duration: of the video, in seconds; None where only the frames are known.
    """

    frames: list[Image.Image]
    fps: float | int
    times: tuple[float, ...]
    duration: float | None = None


def times_of_parts(times: Sequence[float], frames_per_part: int) -> list[float]:
    """The time of each part of a video in seconds: the mean of its first and last frame; the last part may be shorter.

    Source: transformers, models/qwen3_vl/processing_qwen3_vl.py, _calculate_timestamps.
    """
    last = len(times) - 1
    starts = range(0, len(times), frames_per_part)
    return [(times[start] + times[min(start + frames_per_part - 1, last)]) / 2 for start in starts]


def read_video(
    source: str | os.PathLike | bytes,
    sampling: FrameSampler,
    *,
    max_pixels: int = 100_000_000,
    name: str = "video",
    allow_network: bool = False,
) -> Clip:
    """Decodes a video file with PyAV, upright; frames that are not selected are decoded and discarded.

    Args:
      source: a location as in `sources.located`, or the file's bytes.
      sampling: selects frames.
      max_pixels: maximum pixels of a frame.
      name: name of the file in errors when `source` is bytes.
      allow_network: whether a web address is downloaded.

    Returns:
      The frames in RGB, their number per second, and the time of each.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: it has no video that can be decoded, or the frames are too large, each or all together.
    """
    with _opened(resolved(source, name, allow_network=allow_network), name) as (container, name):
        stream, total, fps = _counted(container, max_pixels, name)
        container.seek(0)
        chosen = _chosen(sampling, stream, total, fps, name)
        wanted, frames = set(chosen.tolist()), {}
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames[number] = _upright(frame.to_image(), frame.rotation)
            if number == chosen[-1]:
                break
    if len(frames) < len(wanted):
        raise CorruptImage(
            f"{name}: {len(frames)} of {len(wanted)} chosen frames could be decoded; the file is truncated"
        )
    times = tuple((chosen / fps).tolist())
    return Clip([frames[number] for number in chosen.tolist()], len(chosen) / total * fps, times, total / fps)


def video_size(
    source: str | os.PathLike | bytes,
    sampling: FrameSampler,
    *,
    max_pixels: int = 100_000_000,
    name: str = "video",
) -> VideoSize:
    """The size of what `read_video` would give; of the frames only the first is decoded.

    Args and errors as of `read_video`.
    """
    with _opened(resolved(source, name), name) as (container, name):
        stream, total, fps = _counted(container, max_pixels, name)
        container.seek(0)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise CorruptImage(f"{name}: no frame can be decoded")
        height, width = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        chosen = _chosen(sampling, stream, total, fps, name)
        return VideoSize(len(chosen), height, width, tuple((chosen / fps).tolist()), total / fps)


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes, name: str) -> Iterator[tuple[Any, str]]:
    """A container and its name for messages; FFmpeg's errors become CorruptImage."""
    import av  # FFmpeg's libraries, only needed for videos

    name = name if isinstance(source, bytes) else os.fspath(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else regular(source, CorruptImage).open("rb")
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    try:
        with opened as file, av.open(file, "r", options=allowed, metadata_errors="replace") as container:
            yield container, name
    except av.FFmpegError as error:
        raise CorruptImage(
            f"{name}: {type(error).__name__}: {error}; expected a container of the kinds {', '.join(CONTAINERS)}"
        ) from error


def _counted(container: Any, max_pixels: int, name: str) -> tuple[Any, int, float]:
    """The video stream of a container, its number of frames, and frames per second."""
    if not container.streams.video:
        raise CorruptImage(f"{name}: no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise CorruptImage(f"{name}: no decoder for the codec of its video")
    if stream.width * stream.height > max_pixels:
        raise CorruptImage(
            f"{name}: its frames have {stream.height}x{stream.width} pixels, more than max_pixels={max_pixels}"
        )
    most = min(max_pixels, max(MAX_CHANGE * stream.width * stream.height, LARGE_FRAME))
    stream.codec_context.options = {"max_pixels": str(most)}  # of every frame, whatever the header tells
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    # The number of frames in headers may be missing or wrong; packets are counted without decoding.
    # Those before a cut, which the edit list of a file hides, are decoded but not shown.
    total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    if not total or not fps:
        raise CorruptImage(f"{name}: {total} frames at {fps} frames per second")
    return stream, total, fps


def _chosen(sampling: FrameSampler, stream: Any, total: int, fps: float, name: str) -> np.ndarray:
    """Indices of the frames of a stream; raises if they would not fit into memory."""
    chosen = sampling.chosen(total, fps)
    count = len(set(chosen.tolist()))
    if count * stream.width * stream.height > MAX_VIDEO_PIXELS:
        raise CorruptImage(
            f"{name}: its {count} selected frames of {stream.height}x{stream.width} pixels have more than "
            f"{MAX_VIDEO_PIXELS} pixels, all of which are held; select fewer with nframes or max_frames, or shrink the "
            "video"
        )
    return chosen


def _upright(picture: Image.Image, degrees: int) -> Image.Image:
    """The image rotated counterclockwise, according to a file's display matrix."""
    turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    return picture if degrees % 360 not in turn else picture.transpose(turn[degrees % 360])


def uniform_frames(count: int, wanted: int) -> list[int]:
    """Indices of the middles of `wanted` equal parts of `count` frames, in order.

    With fewer frames than `wanted`, frames are repeated.

    Source: Wang et al. 2016 (TSN), section 3.1, at the middle of each segment as in testing.
    """
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
