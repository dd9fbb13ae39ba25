"""What sources of composed pages share: a page's ink and noise, the tasks of its turns, captions and sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.data.packing import fingerprint
from vlm_jax.data.source import SizedStream
from vlm_jax.types import CellBatch, Sample, SampleSizes

NOISE_BANK = 1 << 16  # number of possible offsets of a page's noise in the bank of normal deviates


class Weathering:
    """Paler ink and noise, drawn for each page."""

    def __init__(self, page_size: int, intensity: float, noise: float):
        """Draws the bank of deviates, from a fixed seed.

        Args:
          page_size: side of the square pages, pixels.
          intensity: a page's ink is multiplied by a number in [1 - intensity, 1].
          noise: a page's noise is normal, with a standard deviation in [0, noise] grey levels of 255.
        """
        self._intensity, self._noise = intensity, noise
        if noise:
            deviates = np.random.default_rng(0).standard_normal(NOISE_BANK + page_size**2)
            self._deviates = deviates.astype(np.float32)

    def __call__(self, pixels: UInt8[np.ndarray, "size size"], rng: np.random.Generator) -> np.ndarray:
        """The page with both, of the same shape and dtype; nothing is drawn where neither is set."""
        if not self._intensity and not self._noise:
            return pixels
        paler, louder, start = rng.random(3)
        page = pixels * np.float32(1.0 - self._intensity * paler)
        if self._noise:
            first = int(start * NOISE_BANK)
            page += self._deviates[first : first + page.size].reshape(page.shape) * np.float32(self._noise * louder)
        return np.clip(np.rint(page), 0, 255).astype(np.uint8)


def bounds_of(weights: Sequence[float]) -> Float[np.ndarray, "tasks_but_one"]:
    """Where in [0, 1) one task ends and the next begins, for tasks with these relative frequencies."""
    shares = np.array(weights)
    return np.cumsum(shares / shares.sum())[:-1]


def draw_tasks(
    rng: np.random.Generator, tasks: Sequence[str], bounds: Float[np.ndarray, "tasks_but_one"], turns: int
) -> list[str]:
    """The task of each turn of a page.

    Systematic sampling: one random number for all turns keeps the task frequencies of a page, and so
    the length of its row, as close to the weights as possible.

    Args:
      rng: of the page.
      tasks: names.
      bounds: of `bounds_of`.
      turns: number of turns.
    """
    places = rng.permutation((np.arange(turns) + rng.random()) / turns)
    return [tasks[int(place)] for place in np.searchsorted(bounds, places, side="right")]


def captioned(name: str, pixels: UInt8[np.ndarray, "height width 1"], caption: str) -> Sample:
    """A sample of the stream `captions`."""
    messages = ({"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption})
    return Sample(name, messages, (pixels,), "caption")


def sized(samples: grain.MapDataset[Sample | CellBatch], kind: str, settings: Any) -> SizedStream:
    """As `Source.sized`, of the samples of `Source.train`; pages are composed to know their questions.

    Args:
      samples: of a stream other than `cells`.
      kind: of the source.
      settings: its dataclass, on which the data depend.
    """

    def sizes(sample: Sample | CellBatch) -> SampleSizes:
        assert isinstance(sample, Sample)
        return SampleSizes(sample.sample_id, sample.messages, tuple(image.shape[:2] for image in sample.images))

    return SizedStream(samples, samples.map(sizes), None, fingerprint({kind: dataclasses.asdict(settings)}))
