"""A release on trial: a question about a picture, answered at a token budget and at the full one."""

import collections
import dataclasses
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid
from vlm_jax.config import ConfigError, choose
from vlm_jax.demo.compilations import compilations
from vlm_jax.demo.drawing import draw_kept, shown
from vlm_jax.demo.kept import kept_boxes
from vlm_jax.generation.text import Completion
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.grounding import NamedBox, draw_boxes
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.processors.views import Tiles
from vlm_jax.reducers import REDUCERS
from vlm_jax.serve.batcher import Ended, Event, Piece
from vlm_jax.serve.errors import RequestError
from vlm_jax.serve.request import ChatRequest
from vlm_jax.serve.service import ServeSettings, Service
from vlm_jax.system import System, UnsupportedError

NONE = "none"
PREFERRED = ("visionzip", "uniform_stride", "random", NONE)  # the reducer that the page starts with, if it can be
REMEMBERED = 16  # answers at the full budget
SIZES = ((64, 64), (512, 2048), (2048, 512), (1024, 1024), (4096, 4096), (1024, 3072), (3072, 1024))


class TrialError(ValueError):
    """A question that is not answered; the message is for the person who asks."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, or what there is of it.

    Attributes:
      text: so far.
      visual_tokens: that enter the decoder, and after each drop in it; empty before the end.
      num_tokens: new tokens; 0 before the end.
      first_seconds: from the decoded request to the first text; None where there is no text yet.
      seconds: to its end; None before it, and while a run without compilation is still to come.
      completion: the whole answer; None before its end.
    """

    text: str = ""
    visual_tokens: tuple[int, ...] = ()
    num_tokens: int = 0
    first_seconds: float | None = None
    seconds: float | None = None
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a page shows of a question.

    Attributes:
      stage: what happens now; empty at the end.
      budget: the answer at the token budget.
      full: the answer at the full budget.
      drawing: the picture with the kept parts and the boxes of `budget`.
      full_drawing: the picture with the boxes of `full`; None where it has none.
      caption: what `drawing` shows.
    """

    stage: str
    budget: Answer = Answer()
    full: Answer = Answer()
    drawing: Image.Image | None = None
    full_drawing: Image.Image | None = None
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its picture.

    Attributes:
      content: bytes of the picture's file.
      picture: the picture in RGB.
      text: the question.
    """

    content: bytes
    picture: Image.Image
    text: str


class Trial:
    """Answers questions about pictures with one release.

    Attributes:
      service: the release with its queue.
      reducers: kinds that suit the release, `none` first.
    """

    def __init__(self, name: str, model: Pretrained, settings: ServeSettings, *, cache_dtype: str | None = None):
        """Finds out which reducers the release can have.

        Raises:
          UnsupportedError: the release does not answer questions about pictures.
          ChatTemplateError, TokenizerError: it lacks a file.
        """
        system, module = model.system, model.module
        system.processor  # noqa: B018 (raises for a model without conversations)
        if not isinstance(module, VLM) or module.encoder is None or module.decoder is None:
            raise UnsupportedError(f"'{name}' is a language model without an encoder; pass a vision-language model")
        self.service = Service(name, model, settings, cache_dtype=cache_dtype)
        self._model = model
        self._remembered: collections.OrderedDict[tuple[str, str], Answer] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.reducers = tuple(kind for kind in REDUCERS if self._suits(kind))
        compilations()

    @property
    def initial_reducer(self) -> str:
        """The reducer that a page starts with."""
        return next(kind for kind in PREFERRED if kind in self.reducers)

    def check_reducer(self, kind: str) -> None:
        """Raises a ConfigError unless the release can have a reducer."""
        choose(REDUCERS, kind, "--reducer")
        if kind not in self.reducers:
            told = f"--reducer: {kind} does not suit this release; choose one of {', '.join(self.reducers)}"
            raise ConfigError(told)

    def most_tokens(self, reducer: str) -> int:
        """The largest budget with an effect: of a tile with a reducer, else of an image with all its tiles."""
        views = self._model.system.processor.views
        if reducer != NONE and isinstance(views, Tiles):
            return views.tile_tokens
        counts = [self._model.count_visual_tokens([size])[0] for size in SIZES]
        return max(counts)

    def unit(self, reducer: str) -> str:
        """What a token budget counts."""
        if reducer == NONE:
            return "At most so many visual tokens of the picture, by fewer tiles or pixels."
        if isinstance(self._model.system.processor.views, Tiles) and self.most_tokens(reducer) < self.most_tokens(NONE):
            return "Visual tokens of each tile of the picture."
        return "Visual tokens of the picture."

    def ask(
        self, source: str | os.PathLike[str] | bytes | None, text: str, token_budget: int, reducer: str
    ) -> Iterator[Progress]:
        """Answers a question at a token budget, then at the full one, and yields what there is so far.

        Args:
          source: the picture's file, or its bytes.
          text: the question.
          token_budget: visual tokens, as of `budgets.with_budget`.
          reducer: one of `reducers`.

        Raises:
          TrialError: no picture, no question, a budget that the release cannot have, or a failure of the model.
        """
        question = self._read(source, text)
        system = self._system(token_budget, reducer)
        now = Progress("Answering")
        for answer in self._answers(question, token_budget, reducer):
            now = dataclasses.replace(now, budget=answer, stage=_stage("Answering", answer))
            yield now
        drawing, caption = self._drawing(question, system, reducer, now.budget)
        now = dataclasses.replace(now, drawing=drawing, caption=caption, stage="Answering at the full budget")
        yield now
        for answer in self._full(question):
            now = dataclasses.replace(now, full=answer, stage=_stage("Answering at the full budget", answer))
            yield now
        boxes = self._boxes(self._model.system, now.full, question.picture)
        if boxes:
            picture, factor = shown(question.picture)
            now = dataclasses.replace(now, full_drawing=draw_boxes(picture, _scaled(boxes, factor)))
        yield dataclasses.replace(now, stage="")

    def _suits(self, kind: str) -> bool:
        """Whether the release can have a reducer at some budget."""
        if kind == NONE:
            return True
        try:
            with_budget(self._model.system, max(1, self.most_tokens(kind) // 2), reducer=kind)
        except (InfeasibleBudget, InfeasibleGrid):
            return True  # others may be met, which the message names
        except ConfigError:
            return False
        return True

    def _read(self, source: str | os.PathLike[str] | bytes | None, text: str) -> Question:
        if source is None:
            raise TrialError("There is no picture yet: choose one, or drop it on the page.")
        if not text.strip():
            raise TrialError("There is no question yet: write one.")
        try:
            if not isinstance(source, bytes):
                with open(source, "rb") as file:
                    source = file.read()
            picture = to_picture(source, max_pixels=self.service.settings.max_pixels, name="the picture")
        except (CorruptImage, OSError) as error:
            raise TrialError(f"The picture was not read: {error}") from error
        return Question(source, picture, text)

    def _system(self, token_budget: int | None, reducer: str | None) -> System:
        try:
            return self.service.system(token_budget, reducer)
        except RequestError as error:
            raise TrialError(_plain(error.message)) from error
        except (ConfigError, InfeasibleBudget, InfeasibleGrid) as error:
            raise TrialError(_plain(str(error))) from error

    def _full(self, question: Question) -> Iterator[Answer]:
        """The answer at the full budget, which is remembered."""
        key = hashlib.sha256(question.content).hexdigest(), question.text
        with self._lock:
            known = self._remembered.get(key)
        if known is not None:
            yield known
            return
        answer = Answer()
        for answer in self._answers(question, None, None):
            yield answer
        with self._lock:
            self._remembered[key] = answer
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)

    def _answers(self, question: Question, token_budget: int | None, reducer: str | None) -> Iterator[Answer]:
        """The answer as it comes; where a program was compiled meanwhile, its times are those of a second run."""
        before, answer = compilations().count(), Answer()
        for answer in self._run(question, token_budget, reducer):
            yield dataclasses.replace(answer, first_seconds=None, seconds=None)
        if compilations().count() > before:
            for timed in self._run(question, token_budget, reducer):
                answer = dataclasses.replace(answer, first_seconds=timed.first_seconds, seconds=timed.seconds)
        yield answer

    def _run(self, question: Question, token_budget: int | None, reducer: str | None) -> Iterator[Answer]:
        settings, events = self.service.settings, queue.Queue[Event]()
        content = [{"type": "image", "image": question.content}, {"type": "text", "text": question.text}]
        request = ChatRequest(
            self.service.name,
            ({"role": "user", "content": content},),
            token_budget=token_budget,
            reducer=reducer,
            seed=0,
        )
        try:
            job = self.service.job(request, events.put)
            answer, start = Answer(), time.monotonic()
            deadline = start + settings.request_seconds
            self.service.batcher.submit(job)
        except RequestError as error:
            raise TrialError(_plain(error.message)) from error
        try:
            while answer.completion is None:
                try:
                    event = events.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    told = f"The model did not answer within {settings.request_seconds:g} seconds"
                    raise TrialError(f"{told}; raise --answer_seconds") from None
                if isinstance(event, RequestError):
                    raise TrialError(_plain(event.message))
                answer = _after(answer, event, time.monotonic() - start)
                yield answer
        finally:
            job.cancel()

    def _drawing(
        self, question: Question, system: System, reducer: str, answer: Answer
    ) -> tuple[Image.Image | None, str]:
        """The picture with what a reducer kept of it and the boxes of an answer, and a caption."""
        (picture, factor), size = shown(question.picture), (question.picture.height, question.picture.width)
        content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = [{"role": "user", "content": content}]
        kept = None
        if reducer != NONE:
            batch = system.processor(prompt, [question.content])
            kept = kept_boxes(self._model.system, system, self._model.params, batch, size)
        boxes, said = self._boxes(system, answer, question.picture), []
        if kept is not None:
            picture = draw_kept(picture, kept * factor)
            said.append(f"{reducer} kept the outlined parts, grey ones were dropped")
        if boxes:
            picture = draw_boxes(picture, _scaled(boxes, factor))
            said.append(f"the answer has {len(boxes)} box{'es' * (len(boxes) > 1)}")
        return picture, "; ".join(said) or "All parts of the picture were used"

    def _boxes(self, system: System, answer: Answer, picture: Image.Image) -> list[NamedBox]:
        if answer.completion is None:
            return []
        return dataclasses.replace(self._model, system=system).boxes(answer.completion, picture)


def _after(answer: Answer, event: Event, seconds: float) -> Answer:
    """An answer after one more event."""
    if isinstance(event, Piece):
        first = seconds if answer.first_seconds is None else answer.first_seconds
        return dataclasses.replace(answer, text=answer.text + event.text, first_seconds=first)
    assert isinstance(event, Ended)
    done = event.completion
    first = seconds if answer.first_seconds is None else answer.first_seconds
    return Answer(done.text, done.visual_tokens, len(done.tokens), first, seconds, done)


def _stage(what: str, answer: Answer) -> str:
    return "Measuring its time" if answer.completion is not None else what


def _scaled(boxes: list[NamedBox], factor: float) -> list[NamedBox]:
    scaled = []
    for one in boxes:
        left, top, right, bottom = (side * factor for side in one.box)
        scaled.append(NamedBox((left, top, right, bottom), one.name))
    return scaled


def _plain(message: str) -> str:
    """A message of the server in the words of a page."""
    for words, plain in (
        ("messages, image 0", "the picture"),
        ("request.token_budget", "token budget"),
        ("request.reducer", "reducer"),
        ("config.token_budget", "token budget"),
        ("config.reducer", "reducer"),
    ):
        message = message.replace(words, plain)
    return message[:1].upper() + message[1:]
