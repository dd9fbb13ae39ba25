"""The interface of data sources, and the functions of `processors` that they need.

A source is opened in two steps, so that a config is checked before anything is read:
its settings are a dataclass (parsed from `config.data`, checked when created), and `settings.open(tools)`
reads the data and returns a `Source`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.types import Grid, VideoSize

# Length of an endless stream, whose element i depends on (seed, i).
ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class Tools:
    """Functions of the package `processors`, passed in because `data` does not import it.

    Attributes:
      format_box: (box in pixels, height, width) -> the box as text; `processors.boxes.format_box`.
      read_image: (path, *, channels, max_pixels), or (bytes, …, name=…) -> uint8 [height, width, channels]; raises
        OSError or ValueError for a file without a usable image; `processors.image.open_image`.
      image_size: (path, *, max_pixels), or (bytes, …, name=…) -> its upright (height, width), by its header; raises
        likewise; `processors.image.image_size`.
      prepare_image: uint8 [height, width, channels] -> the encoder's float32 pixels;
        `Experiment.prepare_image`.
      video_size: (path, *, max_pixels), or (bytes, …, name=…) -> `VideoSize`, without decoding frames; raises
        likewise; `processors.video.video_size`.
      placeholders: texts that stand for an image or a video in the model's prompt, which no text of a record may have.
    """

    format_box: Callable[..., str]
    read_image: Callable[..., UInt8[np.ndarray, "height width channels"]]
    image_size: Callable[..., tuple[int, int]]
    prepare_image: Callable[
        [UInt8[np.ndarray, "height width channels"]], Float[np.ndarray, "new_height new_width new_channels"]
    ]
    video_size: Callable[..., VideoSize]
    placeholders: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Elements(Sequence[Any]):
    """A sequence whose elements are computed by `make` from their indices at every access; a slice is a list."""

    make: Callable[[int], Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        places = range(self.count)[index]
        return self.make(places) if isinstance(places, int) else [self.make(place) for place in places]


@dataclasses.dataclass(frozen=True)
class SizedStream:
    """A training stream whose sample sizes are known before any pixel is decoded.

    Attributes:
      samples: element i is that of `Source.train`, but None where it cannot be read.
      sizes: of the same samples; None where not even the sizes can be read.
      epoch: elements after which the samples come again, in another order; None for a stream without epochs.
      fingerprint: of the data that the samples are made from.
    """

    samples: grain.MapDataset[Any]
    sizes: grain.MapDataset[Any]
    epoch: int | None
    fingerprint: str


@runtime_checkable
class Source(Protocol):
    """An opened source.

    Attributes:
      streams: names that `train` and `evaluation` accept, always including "questions".
      tasks: all tasks of this source's turns, in a fixed order.
      channels: channels of its images, 1 or 3.
    """

    streams: tuple[str, ...]
    tasks: tuple[str, ...]
    channels: int

    def train(self, stream: str, seed: int) -> grain.MapDataset[Any]:
        """An endless stream whose element i depends only on (seed, i) and the data."""
        ...

    def sized(self, stream: str, seed: int) -> SizedStream:
        """The stream of `train` with the sizes of its samples; what cannot be read is left out, not replaced."""
        ...

    def evaluation(self, seed: int, stream: str = "questions") -> Iterable[Any]:
        """A fixed, finite set without images of the training data; may be iterated repeatedly."""
        ...

    def references(self, seed: int, stream: str = "questions") -> Iterable[tuple[str, str]]:
        """Names of the samples of `evaluation`, and their reference answers; no image of a file is read."""
        ...


@runtime_checkable
class Settings(Protocol):
    """The config section of a source, with everything known before it is opened.

    Attributes:
      streams: names that `train` and `evaluation` accept.
      num_images: images per sample of `questions`; None where it varies.
      text_streams: streams without pictures, with the maximum tokens of the text before their questions.
      cells: rows and columns of the stream `cells`, or None without one.
      num_classes: classes of a cell.
    """

    streams: tuple[str, ...]
    num_images: int | None
    cells: Grid | None
    num_classes: int

    @property
    def text_streams(self) -> Mapping[str, int]: ...

    @property
    def tasks(self) -> tuple[str, ...]: ...

    @property
    def channels(self) -> int: ...

    def open(self, tools: Tools) -> Source:
        """Reads the data and checks it."""
        ...
