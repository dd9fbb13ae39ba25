"""Pages of printed text as a data source: reading a page or one of its lines, at several text sizes.

A page has one character per cell of one of the `grids`, so that the number of characters of a page, and with it the
characters per visual token at a budget, is part of a sample's task:

| task | question | answer |
|---|---|---|
| ocr:8x16 | `READ 8 BY 16`, of 8 lines of 16 characters | all characters line by line, without separators |
| ocr_line:8x16 | `READ LINE 3 OF 8 BY 16` | the 16 characters of the third line, counted from 1 |

The question states the lines and columns, since how the text is laid out is not what is asked. Answers are scored by
the share of characters that is right; see `evals.metrics.text.character_precision`.

Streams:
  questions: samples with one image and several turns of random tasks.
  text_pages: the same questions without an image. The page's characters precede the first question, as a grid of visual
    tokens would be read: those of one of `context_grids`, each cell with the character that covers it.
  cells: `CellBatch`es of one page, for training only an encoder. All text sizes have the cells of one grid, which all
    `grids` divide; the class and the box of a cell are those of the character that covers it.
  captions: samples with one image and its caption, all characters of the page.

Training and test pages have other characters, from generators of other keys. Test pages are neither shifted nor noisy,
and have the fonts of training pages, as documents do, unless `test_fonts` names others. Element i of a training stream
depends only on (seed, stream, i).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import grain
import numpy as np

from vlm_jax.config import ConfigError, check_fields, did_you_mean
from vlm_jax.data.document_pages import DocumentPages, finer, text_of_page
from vlm_jax.data.drawing import bounds_of, captioned, draw_tasks, sized
from vlm_jax.data.glyphs import CHARACTERS, check_fonts
from vlm_jax.data.pages import Page
from vlm_jax.data.source import ENDLESS, Elements, SizedStream, Tools
from vlm_jax.ranges import Count, NonNegative, Range, Side
from vlm_jax.types import CellBatch, Grid, Sample, Turn, dialogue

KINDS = ("ocr", "ocr_line")
STREAMS = ("questions", "text_pages", "cells", "captions")
# First key of every generator, so that different uses of a seed generate different pages.
TRAIN_KEY, TEST_KEY = 0, 1

Cells = Annotated[int, Range(1, 256)]  # of a row or a column


@dataclasses.dataclass(frozen=True)
class Documents:
    """Settings of the pages of text, keys of config.data.

    Attributes:
      grids: lines, and characters of a line, of each text size; a page has one of them, all equally often.
      page_size: side of the square page, pixels; a multiple of the grids' sides.
      fonts: of training pages: names of files of matplotlib without `.ttf`, equally often. Those of fixed width fill
        their cells; others are as small as their widest character requires.
      test_fonts: of test pages; those of training pages where it is empty.
      context_grids: of `text_pages`: rows and columns of the grids in which the characters of a page are written,
        drawn for each page from those that its own grid divides; the first is that of evaluation pages. The grid of
        `cells` where it is empty.
      task_weights: relative frequency of `ocr` and `ocr_line`; one with weight 0 or omitted is neither trained nor
        evaluated.
      turns_per_page: questions about one page, in training.
      evaluation_size: evaluation samples per task (and pages of the streams `cells` and `captions`).
      augment: whether training pages are augmented with shifts, paler ink and noise; test pages never are.
      jitter: the most pixels by which a line is shifted to each side, with `augment`.
      intensity: maximum loss of ink of a page, a fraction, with `augment`.
      noise: maximum standard deviation of a page's noise, in grey levels of 255, with `augment`.
    """

    grids: tuple[tuple[Cells, Cells], ...] = ((4, 4), (8, 8), (8, 16))
    page_size: Side = 96
    fonts: tuple[str, ...] = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "cmtt10")
    test_fonts: tuple[str, ...] = ()
    context_grids: tuple[tuple[Cells, Cells], ...] = ()
    task_weights: dict[str, NonNegative] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    turns_per_page: Count = 2
    evaluation_size: Count = 64
    augment: bool = True
    jitter: Annotated[int, Range(0, 100)] = 1
    intensity: Annotated[float, Range(0, below=1)] = 0.25
    noise: Annotated[float, Range(0, 255)] = 8.0

    streams = STREAMS
    channels = 1
    num_images = 1
    num_classes = len(CHARACTERS)

    def __post_init__(self):
        check_fields(self, "config.data.")
        if not self.grids:
            raise ConfigError("config.data.grids: expected at least one text size, got none")
        for index, grid in enumerate(self.grids):
            if grid in self.grids[:index]:
                raise ConfigError(f"config.data.grids[{index}]: {_named(grid)} is there twice; remove one")
            if any(self.page_size % side for side in grid):
                raise ConfigError(
                    f"config.data.page_size: {self.page_size} pixels are not divided by the {_named(grid)} cells of "
                    f"config.data.grids[{index}]; set it to a multiple of {math.lcm(*grid)}"
                )
            if not any(_divides(grid, context) for context in self.contexts):
                raise ConfigError(
                    f"config.data.context_grids: expected one with multiples of {_named(grid)}, got "
                    + ", ".join(map(_named, self.contexts))
                )
        if not self.fonts:
            raise ConfigError("config.data.fonts: expected at least one font, got none")
        for task in self.task_weights:
            if task not in KINDS:
                raise ConfigError(f"config.data.task_weights.{task}: no such task{did_you_mean(task, KINDS)}")
        if not self.tasks:
            raise ConfigError("config.data.task_weights: no task has a weight above 0; set one of " + ", ".join(KINDS))
        if 4 * self.jitter > self.page_size // max(map(max, self.grids)):
            raise ConfigError(
                f"config.data.jitter: {self.jitter} pixels are over a quarter of the smallest cell's side, "
                f"{self.page_size // max(map(max, self.grids))}; lower it"
            )
        check_fonts(self.fonts, "config.data.fonts")
        check_fonts(self.test_fonts, "config.data.test_fonts")

    @property
    def cells(self) -> Grid:
        """Rows and columns of the stream `cells`: the coarsest grid that all text sizes divide."""
        rows, cols = zip(*self.grids, strict=True)
        return math.lcm(*rows), math.lcm(*cols)

    @property
    def contexts(self) -> tuple[Grid, ...]:
        """`context_grids`, or the grid of `cells`."""
        return self.context_grids or (self.cells,)

    @property
    def text_streams(self) -> dict[str, int]:
        """The characters of the longest page as text, one token each."""
        return {"text_pages": max(rows * cols for rows, cols in self.contexts)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What of a page is read: the kinds with a weight."""
        return tuple(kind for kind in KINDS if self.task_weights.get(kind, 0.0) > 0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Each kind with each text size, as `ocr:8x16`."""
        return tuple(f"{kind}:{_named(grid)}" for kind in self.kinds for grid in self.grids)

    def open(self, tools: Tools) -> "DocumentSource":
        """Renders the fonts.

        Raises:
          ConfigError: a cell is too small for a font.
        """
        return DocumentSource(self, tools)


def _named(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _divides(grid: Grid, other: Grid) -> bool:
    return not any(fine % own for own, fine in zip(grid, other, strict=True))


def ask(kind: str, task: str, page: Page, draw: float) -> Turn:
    """Creates one question about a page and its answer.

    Args:
      kind: one of KINDS.
      task: of the turn.
      page: the page.
      draw: in [0, 1), selects the line.
    """
    (rows, cols), text = page.classes.shape, text_of_page(page)
    if kind == "ocr":
        return Turn(f"READ {rows} BY {cols}", text, task)
    line = int(draw * rows)
    return Turn(f"READ LINE {line + 1} OF {rows} BY {cols}", text[line * cols : (line + 1) * cols], task)


class DocumentSource:
    """The pages of text, opened; see the module for its streams."""

    streams = STREAMS
    channels = 1

    def __init__(self, settings: Documents, tools: Tools):
        self.settings = settings
        self.tasks = settings.tasks
        self._tools = tools
        pages = functools.partial(DocumentPages, grids=settings.grids, page_size=settings.page_size)
        augmentation = {key: getattr(settings, key) for key in ("jitter", "intensity", "noise")}
        self._train_pages = pages(fonts=settings.fonts, **(augmentation if settings.augment else {}))
        self._test_pages = pages(fonts=settings.test_fonts or settings.fonts)

    def train(self, stream: str, seed: int) -> grain.MapDataset[Sample | CellBatch]:
        """An endless stream of training pages.

        Args:
          stream: "questions", "text_pages", "cells" or "captions".
          seed: 0 or more.

        Returns:
          A MapDataset of Sample, or for "cells" of CellBatch with B = 1.

        Raises:
          ConfigError: no such stream.
        """
        _check_stream(stream)
        kinds = self.settings.kinds
        bounds = bounds_of([self.settings.task_weights[kind] for kind in kinds])
        return grain.MapDataset.range(ENDLESS).map(functools.partial(self._element, stream, seed, kinds, bounds))

    def _element(
        self, stream: str, seed: int, kinds: tuple[str, ...], bounds: np.ndarray, index: int
    ) -> Sample | CellBatch:
        rng = np.random.default_rng((TRAIN_KEY, seed, STREAMS.index(stream), index))
        name, settings = f"documents/train/{seed}/{index}", self.settings
        grid = settings.grids[int(rng.random() * len(settings.grids))]
        page = self._train_pages.compose(rng, grid)
        if stream == "cells":
            return self._cells(page)
        if stream == "captions":
            return captioned(name, page.pixels, text_of_page(page))
        chosen = draw_tasks(rng, kinds, bounds, settings.turns_per_page)
        questions = list(zip(chosen, rng.random(settings.turns_per_page).tolist(), strict=True))
        contexts = [context for context in settings.contexts if _divides(grid, context)]
        return _sample(name, stream, page, questions, contexts[int(rng.random() * len(contexts))])

    def sized(self, stream: str, seed: int) -> SizedStream:
        """As `Source.sized`."""
        return sized(self.train(stream, seed), "documents", self.settings)

    def evaluation(self, seed: int, stream: str = "questions") -> Sequence[Sample | CellBatch]:
        """The fixed set of test pages for a seed, composed as they are iterated.

        Returns:
          `evaluation_size` samples of one turn for every task, task by task, each with a separate page; or for each
          text size as many CellBatches with B = 1, or captioned pages.

        Raises:
          ConfigError: as for `train`.
        """
        _check_stream(stream)
        size, grids = self.settings.evaluation_size, self.settings.grids
        kinds = (stream,) if stream in ("cells", "captions") else self.settings.kinds
        drawn = [(kind, grid) for kind in kinds for grid in grids]

        def element(number: int) -> Sample | CellBatch:
            (kind, grid), index = drawn[number // size], number % size
            # Keyed by the kind and the grid: omitting one does not change the others.
            place = KINDS.index(kind) if kind in KINDS else len(KINDS)
            rng = np.random.default_rng((TEST_KEY, seed, STREAMS.index(stream), place, *grid, index))
            page = self._test_pages.compose(rng, grid)
            name = f"documents/test/{seed}/{kind}:{_named(grid)}/{index}"
            if stream == "cells":
                return self._cells(page)
            if stream == "captions":
                return captioned(name, page.pixels, text_of_page(page))
            context = next(context for context in self.settings.contexts if _divides(grid, context))
            return _sample(name, stream, page, [(kind, rng.random())], context)

        return Elements(element, len(drawn) * size)

    def references(self, seed: int, stream: str = "questions") -> Iterator[tuple[str, str]]:
        """As `Source.references`."""
        for sample in self.evaluation(seed, stream):
            assert isinstance(sample, Sample)
            yield sample.sample_id, sample.answer

    def _cells(self, page: Page) -> CellBatch:
        fine, (height, width, _) = finer(page, self.settings.cells), page.pixels.shape
        return CellBatch(
            images=self._tools.prepare_image(page.pixels)[None, None],
            classes=fine.classes[None].astype(np.int32),
            boxes=(fine.boxes / (width, height, width, height))[None].astype(np.float32),
        )


def _sample(name: str, stream: str, page: Page, questions: Sequence[tuple[str, float]], context: Grid) -> Sample:
    size = _named(page.classes.shape)
    turns = [ask(kind, f"{kind}:{size}", page, draw) for kind, draw in questions]
    if stream == "text_pages":
        return Sample(name, dialogue(turns, context=text_of_page(finer(page, context))), task=turns[-1].task)
    return Sample(name, dialogue(turns, num_images=1), (page.pixels,), turns[-1].task)


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ConfigError(f"documents: no stream '{stream}'{did_you_mean(stream, STREAMS)}")
