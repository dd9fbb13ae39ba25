"""Videos: frame sampling and decoding."""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlm_jax.paths import regular
from vlm_jax.processors.image import CorruptImage

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

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; qwen-vl-utils, vision_process.py, smart_nframes.
    """

    fps: float | int = 2.0
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 2

    def chosen(self, num_frames: int, video_fps: float | int) -> np.ndarray:
        """Indices of the frames; see `FrameSampler`."""
        wanted = min(max(num_frames / video_fps * self.fps, self.min_frames), self.max_frames, num_frames)
        count = max(math.floor(wanted / self.multiple) * self.multiple, 1)
        return np.rint(np.linspace(0, num_frames - 1, count)).astype(int)


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


def read_video(
    source: str | os.PathLike | bytes,
    sampling: FrameSampler,
    *,
    max_pixels: int = 100_000_000,
    name: str = "video",
) -> tuple[list[Image.Image], float]:
    """Decodes a video file with PyAV, upright; frames that are not selected are decoded and discarded.

    Args:
      source: a path, local or `gs://`, or the file's bytes.
      sampling: selects frames.
      max_pixels: maximum pixels of a frame.
      name: name of the file in errors when `source` is bytes.

    Returns:
      The frames in RGB, and their number per second.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: it has no video that can be decoded, or the frames are too large.
    """
    with _opened(source, name) as (container, name):
        stream, total, fps = _counted(container, max_pixels, name)
        container.seek(0)
        chosen = sampling.chosen(total, fps)
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
    return [frames[number] for number in chosen.tolist()], len(chosen) / total * fps


def video_size(
    source: str | os.PathLike | bytes,
    sampling: FrameSampler,
    *,
    max_pixels: int = 100_000_000,
    name: str = "video",
) -> tuple[int, int, int]:
    """(number of frames, height, width) that `read_video` would give; of the frames only the first is decoded.

    Args and errors as of `read_video`.
    """
    with _opened(source, name) as (container, name):
        stream, total, fps = _counted(container, max_pixels, name)
        container.seek(0)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise CorruptImage(f"{name}: no frame can be decoded")
        height, width = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        return len(sampling.chosen(total, fps)), height, width


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
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    # The number of frames in headers may be missing or wrong; packets are counted without decoding.
    total = sum(packet.size > 0 for packet in container.demux(stream))
    if not total or not fps:
        raise CorruptImage(f"{name}: {total} frames at {fps} frames per second")
    return stream, total, fps


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
