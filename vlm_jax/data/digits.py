"""The digit pages as a data source: visual questions, the same without images, and dense targets.

Streams:
  questions: samples with one image and several turns of random tasks.
  text_pages: questions without an image: the page's digits in reading order precede the first. Nothing is located.
  fine_text_pages: the same, with a square of copies of its digit for every cell, like a finer grid of visual tokens.
    Text has no ink, so that the box of a digit is that of its cell.
  cells: `CellBatch`es of one page, for training only an encoder.
  captions: samples with one image and its caption, the page's digits in reading order.

Element i of a training stream depends only on (seed, stream, i).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated

import grain
import numpy as np

from vlm_jax.config import ConfigError, check_fields, did_you_mean
from vlm_jax.data.digit_questions import TASKS, ask, digits_in_reading_order
from vlm_jax.data.drawing import bounds_of, captioned, draw_tasks, sized
from vlm_jax.data.pages import DigitPages, Page
from vlm_jax.data.source import ENDLESS, Elements, SizedStream, Tools
from vlm_jax.ranges import Count, NonNegative, Range, Share, Side
from vlm_jax.types import CellBatch, Grid, Sample, dialogue

STREAMS = ("questions", "text_pages", "cells", "captions", "fine_text_pages")
# First key of every generator, so that different uses of a seed generate different pages.
TRAIN_KEY, TEST_KEY = 0, 1

Cells = Annotated[int, Range(1, 100)]  # of a row or a column


@dataclasses.dataclass(frozen=True)
class Digits:
    """Settings of the digit pages, keys of config.data.

    Attributes:
      rows: rows of cells.
      cols: columns of cells.
      page_size: side of the square page, pixels.
      min_digit: smallest side of a pasted digit, pixels.
      max_digit: largest side of a pasted digit, pixels; at most the cell's.
      task_weights: relative frequency of each task; a task with weight 0 or
        omitted is not trained or evaluated.
      turns_per_page: questions about one page, in training.
      turns_per_text_page: questions about one page of `text_pages`, in training; they are shorter.
      text_scale: side of the square of characters that represents a cell in `fine_text_pages`.
      coarse_share: share of the pages of `fine_text_pages`, in training, whose cells are one character each.
      evaluation_size: evaluation samples per task (and pages of the streams `cells` and `captions`).
      augment: whether training pages are augmented with warps, paler ink and noise; test pages never are.
      variants: warped copies of every scan, with `augment`.
      intensity: maximum loss of ink of a page, a fraction, with `augment`.
      noise: maximum standard deviation of a page's noise, in grey levels of 255, with `augment`.
    """

    rows: Cells = 4
    cols: Cells = 4
    page_size: Side = 48
    min_digit: Side = 8
    max_digit: Side = 12
    task_weights: dict[str, NonNegative] = dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    turns_per_page: Count = 4
    turns_per_text_page: Count = 4
    text_scale: Cells = 2
    coarse_share: Share = 0.0
    evaluation_size: Count = 128
    augment: bool = True
    variants: Annotated[int, Range(1, 1000)] = 8
    intensity: Annotated[float, Range(0, below=1)] = 0.25
    noise: Annotated[float, Range(0, 255)] = 8.0

    streams = STREAMS
    channels = 1
    num_images = 1
    num_classes = 10

    @property
    def text_streams(self) -> dict[str, int]:
        """The digits of a page as text, one token each, of the streams without pictures."""
        cells = self.rows * self.cols
        return {"text_pages": cells, "fine_text_pages": cells * self.text_scale**2}

    @property
    def cells(self) -> Grid:
        """Rows and columns of the stream `cells`."""
        return self.rows, self.cols

    def __post_init__(self):
        check_fields(self, "config.data.")
        for task in self.task_weights:
            if task not in TASKS:
                raise ConfigError(f"config.data.task_weights.{task}: no such task{did_you_mean(task, TASKS)}")
        if not self.tasks:
            raise ConfigError("config.data.task_weights: no task has a weight above 0; set one of " + ", ".join(TASKS))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with a weight, in the order of the table of tasks."""
        return tuple(task for task in TASKS if self.task_weights.get(task, 0.0) > 0)

    def open(self, tools: Tools) -> "DigitSource":
        """Renders the scans of both splits.

        Raises:
          ConfigError: the page cannot be composed.
        """
        return DigitSource(self, tools)


class DigitSource:
    """The digit pages, opened; see the module for its streams."""

    streams = STREAMS
    channels = 1

    def __init__(self, settings: Digits, tools: Tools):
        self.settings = settings
        self.tasks = settings.tasks
        self._tools = tools
        pages = functools.partial(
            DigitPages,
            rows=settings.rows,
            cols=settings.cols,
            page_size=settings.page_size,
            min_digit=settings.min_digit,
            max_digit=settings.max_digit,
        )
        augmentation = {key: getattr(settings, key) for key in ("variants", "intensity", "noise")}
        self._train_pages = pages("train", **(augmentation if settings.augment else {}))
        self._test_pages = pages("test")

    def train(self, stream: str, seed: int) -> grain.MapDataset[Sample | CellBatch]:
        """An endless stream of training pages.

        Args:
          stream: one of STREAMS.
          seed: 0 or more.

        Returns:
          A MapDataset of Sample, or for "cells" of CellBatch with B = 1.

        Raises:
          ConfigError: no such stream, or no task for it has a weight.
        """
        tasks = self._tasks_of(stream)
        bounds = bounds_of([self.settings.task_weights[task] for task in tasks])
        return grain.MapDataset.range(ENDLESS).map(functools.partial(self._element, stream, seed, tasks, bounds))

    def _element(
        self, stream: str, seed: int, tasks: tuple[str, ...], bounds: np.ndarray, index: int
    ) -> Sample | CellBatch:
        rng = np.random.default_rng((TRAIN_KEY, seed, STREAMS.index(stream), index))
        page = self._train_pages.compose(rng)
        if stream == "cells":
            return self._cells(page)
        if stream == "captions":
            return captioned(f"digits/train/{seed}/{index}", page.pixels, digits_in_reading_order(page))
        turns = self.settings.turns_per_text_page if stream == "text_pages" else self.settings.turns_per_page
        chosen = draw_tasks(rng, tasks, bounds, turns)
        questions = list(zip(chosen, rng.random((turns, 3)).tolist(), strict=True))
        is_coarse = rng.random() < self.settings.coarse_share
        return self._sample(f"digits/train/{seed}/{index}", stream, page, questions, is_coarse)

    def sized(self, stream: str, seed: int) -> SizedStream:
        """As `Source.sized`."""
        return sized(self.train(stream, seed), "digits", self.settings)

    def evaluation(self, seed: int, stream: str = "questions") -> Sequence[Sample | CellBatch]:
        """The fixed set of pages of test scans for a seed, composed as they are iterated.

        Returns:
          `evaluation_size` samples of one turn for every task, task by task, each with a separate
          page; or as many CellBatches with B = 1, or captioned pages.

        Raises:
          ConfigError: as for `train`.
        """
        tasks, size = self._tasks_of(stream), self.settings.evaluation_size
        if stream in ("cells", "captions"):
            tasks = (stream,)

        def element(number: int) -> Sample | CellBatch:
            task, index = tasks[number // size], number % size
            # Keyed by the task's index among all tasks: omitting one does not change the others.
            place = TASKS.index(task) if task in TASKS else len(TASKS)
            rng = np.random.default_rng((TEST_KEY, seed, STREAMS.index(stream), place, index))
            page = self._test_pages.compose(rng)
            name = f"digits/test/{seed}/{task}/{index}"
            if stream == "cells":
                return self._cells(page)
            if stream == "captions":
                return captioned(name, page.pixels, digits_in_reading_order(page))
            return self._sample(name, stream, page, [(task, rng.random(3).tolist())])

        return Elements(element, len(tasks) * size)

    def references(self, seed: int, stream: str = "questions") -> Iterator[tuple[str, str]]:
        """As `Source.references`."""
        for sample in self.evaluation(seed, stream):
            assert isinstance(sample, Sample)
            yield sample.sample_id, sample.answer

    def _tasks_of(self, stream: str) -> tuple[str, ...]:
        if stream not in STREAMS:
            raise ConfigError(f"digits: no stream '{stream}'{did_you_mean(stream, STREAMS)}")
        if stream != "text_pages":
            return self.tasks
        if self.tasks == ("locate",):
            raise ConfigError(
                "config.data.task_weights: no task of the stream text_pages has a weight above 0; set one of "
                + ", ".join(task for task in TASKS if task != "locate")
            )
        return tuple(task for task in self.tasks if task != "locate")

    def _sample(
        self, name: str, stream: str, page: Page, questions: list[tuple[str, list[float]]], is_coarse: bool = False
    ) -> Sample:
        if stream == "fine_text_pages":
            page = dataclasses.replace(page, boxes=self._train_pages.cell_boxes)
        turns = [ask(task, page, draws, self._tools.format_box) for task, draws in questions]
        if stream in self.settings.text_streams:
            scale = 1 if stream == "text_pages" or is_coarse else self.settings.text_scale
            context = digits_in_reading_order(page, scale)
            return Sample(name, dialogue(turns, context=context), task=turns[-1].task)
        return Sample(name, dialogue(turns, num_images=1), (page.pixels,), turns[-1].task)

    def _cells(self, page: Page) -> CellBatch:
        height, width, _ = page.pixels.shape
        return CellBatch(
            images=self._tools.prepare_image(page.pixels)[None, None],
            classes=page.classes[None].astype(np.int32),
            boxes=(page.boxes / (width, height, width, height))[None].astype(np.float32),
        )
