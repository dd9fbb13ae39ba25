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
from vlm_jax.config import ConfigError
from vlm_jax.demo.answer import Answer, Progress
from vlm_jax.demo.choices import NONE, Choices
from vlm_jax.demo.compilations import compilations
from vlm_jax.demo.drawing import draw
from vlm_jax.demo.kept import kept_boxes
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.grounding import NamedBox
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.views import Views
from vlm_jax.serve.batcher import Ended, Event
from vlm_jax.serve.errors import RequestError
from vlm_jax.serve.request import ChatRequest
from vlm_jax.serve.service import ServeSettings, Service
from vlm_jax.system import System

REMEMBERED = 16  # answers at the full budget
# Words of the server's messages, and those of the page.
PLAIN = {
    "messages, image 0": "the picture",
    "request.token_budget": "the token budget",
    "request.reducer": "the reducer",
}


class TrialError(ValueError):
    """A question that is not answered; the message is for the person who asks."""


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
      choices: the reducers and budgets of the release.
      service: the release with its queue.
    """

    def __init__(self, name: str, model: Pretrained, settings: ServeSettings, *, cache_dtype: str | None = None):
        """Prepares the release; raises as `Choices` does."""
        self.choices = Choices(model)
        self.service = Service(name, model, settings, cache_dtype=cache_dtype)
        self._model = model
        self._remembered: collections.OrderedDict[tuple[str, str], Answer] = collections.OrderedDict()
        self._lock = threading.Lock()
        compilations()  # counts from now on

    def ask(
        self, source: str | os.PathLike[str] | None, text: str, token_budget: int, reducer: str
    ) -> Iterator[Progress]:
        """Answers a question at a token budget, then at the full one, and yields what there is so far.

        Generation stops when the iterator is closed.

        Args:
          source: the picture's file.
          text: the question.
          token_budget: visual tokens, as of `budgets.with_budget`.
          reducer: one of `choices.reducers`.

        Raises:
          TrialError: no picture, no question, a budget that the release cannot have, or a failure of the model.
        """
        yield Progress("Reading the picture")
        question = _read(source, text, self.service.settings.max_pixels)
        system = self._system(token_budget, reducer)
        now = Progress("Answering at the budget")
        yield now
        for answer in self._answers(question, token_budget, reducer):
            now = dataclasses.replace(now, budget=answer, stage=_stage("Answering at the budget", answer))
            yield now
        drawing, caption = self._drawing(question, system, reducer, now.budget)
        now = dataclasses.replace(now, drawing=drawing, caption=caption, stage="Answering at the full budget")
        yield now
        for answer in self._full(question):
            now = dataclasses.replace(now, full=answer, stage=_stage("Answering at the full budget", answer))
            yield now
        if boxes := self._boxes(self._model.system, now.full, question.picture):
            now = dataclasses.replace(now, full_drawing=draw(question.picture, boxes=boxes))
        yield dataclasses.replace(now, stage="")

    def _system(self, token_budget: int, reducer: str) -> System:
        try:
            return self.service.system(token_budget, reducer)
        except RequestError as error:
            most = self.service.settings.max_budgets
            told = f"All {most} pairs of budget and reducer are taken; choose an earlier one, or raise --max_budgets"
            raise TrialError(told) from error
        except (ConfigError, InfeasibleBudget, InfeasibleGrid) as error:
            raise TrialError(_plain(str(error))) from error

    def _full(self, question: Question) -> Iterator[Answer]:
        """The answer at the full budget, which is remembered for other budgets of the same question."""
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
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)

    def _answers(self, question: Question, token_budget: int | None, reducer: str | None) -> Iterator[Answer]:
        """The answer as it comes; where a program was compiled meanwhile, its times are those of a second run."""
        before, answer = compilations().count(), Answer()
        for answer in self._run(question, token_budget, reducer):
            yield dataclasses.replace(answer, first_seconds=None, seconds=None)
        if compilations().count() > before:
            untimed = dataclasses.replace(answer, first_seconds=None, seconds=None)
            for again in self._run(question, token_budget, reducer):
                answer = again
                yield untimed  # the caller may close the iterator here
        yield answer

    def _run(self, question: Question, token_budget: int | None, reducer: str | None) -> Iterator[Answer]:
        """The answer after each of its pieces, and at its end, of a greedy generation by the server's queue."""
        content = [{"type": "image", "image": question.content}, {"type": "text", "text": question.text}]
        request = ChatRequest(
            self.service.name,
            ({"role": "user", "content": content},),
            token_budget=token_budget,
            reducer=reducer,
            seed=0,
        )
        events = queue.Queue[Event]()
        try:
            job = self.service.job(request, events.put)
            start = time.monotonic()
            self.service.batcher.submit(job)
        except RequestError as error:
            raise TrialError(_plain(error.message)) from error
        limit, answer = self.service.settings.request_seconds, Answer()
        try:
            while answer.completion is None:
                try:
                    event = events.get(timeout=max(0.0, start + limit - time.monotonic()))
                except queue.Empty:
                    told = f"The model did not answer within {limit:g} seconds; raise --answer_seconds"
                    raise TrialError(told) from None
                if isinstance(event, RequestError):
                    raise TrialError(_plain(event.message))
                seconds = time.monotonic() - start
                first = seconds if answer.first_seconds is None else answer.first_seconds
                if isinstance(event, Ended):
                    answer = Answer(event.completion.text, event.completion, first, seconds)
                else:
                    answer = Answer(answer.text + event.text, None, first)
                yield answer
        finally:
            job.cancel()

    def _drawing(self, question: Question, system: System, reducer: str, answer: Answer) -> tuple[Image.Image, str]:
        """The picture with what a reducer kept of it and the boxes of an answer, and a caption."""
        picture, kept = question.picture, None
        if reducer != NONE:
            content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question.text}]
            batch = system.processor([{"role": "user", "content": content}], [question.content])
            size = picture.height, picture.width
            kept = kept_boxes(self._model.system, system, self._model.params, batch, size)
        boxes = self._boxes(system, answer, picture)
        return draw(picture, kept=kept, boxes=boxes), caption(reducer, kept is not None, self._model.processor.views)

    def _boxes(self, system: System, answer: Answer, picture: Image.Image) -> list[NamedBox]:
        assert answer.completion is not None
        return dataclasses.replace(self._model, system=system).boxes(answer.completion, picture)


def caption(reducer: str, drawn: bool, views: Views) -> str:
    """What a reducer kept of a picture, in words.

    Args:
      reducer: its kind, or `none`.
      drawn: whether the parts that it kept are drawn.
      views: of the system without it.
    """
    if reducer == NONE:
        return "All parts of the picture were used"
    if drawn:
        return f"{reducer} kept the outlined parts of the picture, and dropped the grey ones"
    if isinstance(views, MosaicViews) and not views.newlines:
        return f"What {reducer} kept is not drawn: the tokens of this model are not at places of the picture"
    if isinstance(views, MosaicViews) and views.mosaic is not None:
        return f"What {reducer} kept is not drawn: this model sees the picture both as a whole and in tiles"
    return f"{reducer} drops no part of the picture as a whole"


def _read(source: str | os.PathLike[str] | None, text: str, max_pixels: int) -> Question:
    if source is None:
        raise TrialError("There is no picture yet: choose one, or drop it on the page.")
    if not text.strip():
        raise TrialError("There is no question yet: write one.")
    try:
        with open(source, "rb") as file:
            content = file.read()
        return Question(content, to_picture(content, max_pixels=max_pixels, name="the picture"), text)
    except (CorruptImage, OSError) as error:
        raise TrialError(_plain(str(error))) from error


def _stage(what: str, answer: Answer) -> str:
    return what if answer.completion is None else "Measuring its time"


def _plain(message: str) -> str:
    """A message of the server in the words of a page."""
    for words, plain in PLAIN.items():
        message = message.replace(words, plain)
    return message[:1].upper() + message[1:]
