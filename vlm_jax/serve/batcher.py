"""The queue: requests that can be generated together form a batch, which ended and cancelled ones leave."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.generation.text import Completion, RowSettings
from vlm_jax.processors.processor import Example
from vlm_jax.serve.errors import RequestError
from vlm_jax.system import System
from vlm_jax.types import Params

LOG = logging.getLogger(__name__)
WIDTH = 4  # factor between the lengths of prompts, and loads of images, that are padded to one another
SHORTEST = 256  # lengths up to it are padded to one another
FEWEST_NEW_TOKENS = 64  # the cache has room for a power of two of them, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the text of one answer of a request."""

    choice: int
    text: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """The whole of one answer of a request."""

    choice: int
    completion: Completion


Event = Piece | Ended | RequestError


@dataclasses.dataclass(eq=False)
class Job:
    """One request of the queue.

    Attributes:
      system: the model with the request's token budget.
      example: the prompt.
      sampling: of all its answers.
      stop: strings before which an answer ends.
      max_new_tokens: maximum tokens of an answer.
      num_choices: number of answers; each is a row of the batch.
      on_event: called by the batcher's thread with pieces and answers as they come, or with one error.
    """

    system: System
    example: Example
    sampling: Sampling
    stop: Sequence[str]
    max_new_tokens: int
    num_choices: int
    on_event: Callable[[Event], None]

    def __post_init__(self):
        self._cancelled, self.arrived = threading.Event(), time.monotonic()

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for jobs that can be in one batch."""
        load = self.example.load
        length, images = max(SHORTEST, _power(load.length, WIDTH)), load.images and _power(load.images, WIDTH)
        return id(self.system), tuple(self.sampling.values()), length, images

    def cancel(self) -> None:
        """Makes it leave the queue, or its batch after the current chunk; it has no events from then on."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        """Whether it is cancelled."""
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """Passes on an event unless it is cancelled; it ends by an error."""
        if not self.is_cancelled():
            if isinstance(event, RequestError):
                self.cancel()
            self.on_event(event)


class Batcher:
    """Threads that take batches from the queue and generate their answers."""

    def __init__(
        self,
        params: Params,
        *,
        max_rows: int,
        wait_seconds: float | int,
        chunk: int,
        num_batches: int,
        cache_dtype: str | None,
    ):
        """Starts the threads.

        Args:
          params: result of `System.prepared`, of all systems.
          max_rows: maximum rows of a batch.
          wait_seconds: how long the oldest request waits for others in its batch.
          chunk: maximum tokens between two looks at cancelled requests, and between two pieces of text.
          num_batches: number of batches that are generated at once.
          cache_dtype: dtype of the cache; the decoder's own when None.
        """
        self._params, self._max_rows, self._wait = params, max_rows, wait_seconds
        self._chunk, self._cache_dtype = chunk, cache_dtype
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: set[Job] = set()
        self._changed, self._stopped = threading.Condition(), False
        self._threads = [threading.Thread(target=self._run, name=f"batch {n}") for n in range(num_batches)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Adds a job to the queue."""
        with self._changed:
            if self._stopped:
                raise RequestError(503, "the server is shutting down")
            self._waiting.append(job)
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all jobs with an error, and the threads."""
        with self._changed:
            self._stopped = True
            left = [*self._waiting, *self._running]
            self._changed.notify_all()
        for job in left:
            job.tell(RequestError(503, "the server is shutting down"))
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            try:
                self._generate(jobs)
            except GenerationError as error:
                LOG.error("a batch of %d requests failed: %s", len(jobs), error)
                _tell(jobs, RequestError(500, str(error)))
            except Exception:  # XLA's errors, as for lack of memory; the next batch may be smaller
                LOG.exception("a batch of %d requests failed", len(jobs))
                _tell(jobs, RequestError(500, "the server failed to generate the answer; its log has the cause"))
            finally:
                with self._changed:
                    self._running -= set(jobs)

    def _next(self) -> list[Job]:
        """The jobs of the next batch, once there are any; none when the batcher is stopped."""
        with self._changed:
            while not self._stopped:
                self._waiting = collections.deque(job for job in self._waiting if not job.is_cancelled())
                jobs = self._batch()
                left = jobs[0].arrived + self._wait - time.monotonic() if jobs else None
                if left is not None and (left <= 0 or _num_rows(jobs) == self._max_rows):
                    self._waiting = collections.deque(job for job in self._waiting if job not in jobs)
                    self._running |= set(jobs)
                    self._changed.notify_all()  # what is left may be a batch of another thread
                    return jobs
                self._changed.wait(left)
        return []

    def _batch(self) -> list[Job]:
        """The oldest job, and others of its kind for which there is room, in order."""
        jobs: list[Job] = []
        for job in self._waiting:
            fits = _num_rows(jobs) + job.num_choices <= self._max_rows
            if fits and (not jobs or job.kind == jobs[0].kind):
                jobs.append(job)
        return jobs

    def _generate(self, jobs: Sequence[Job]) -> None:
        system = jobs[0].system
        rows = [(job, choice) for job in jobs for choice in range(job.num_choices)]
        # Few sizes of batches, so that few programs are compiled; rows that fill one leave after the prompt.
        fill = min(_power(len(rows), 2), self._max_rows) - len(rows)
        settings = [RowSettings(job.max_new_tokens, job.stop, job.is_cancelled) for job, _ in rows]
        settings += [RowSettings(leaves=lambda: True)] * fill
        filled = [*rows, *rows[-1:] * fill]
        prompts = system.processor.rows([[job.example] for job, _ in filled], targets=False)

        def text(row: int, piece: str) -> None:
            if row < len(rows):
                job, choice = rows[row]
                job.tell(Piece(choice, piece))

        def answer(row: int, completion: Completion) -> None:
            if row < len(rows) and completion.reason != "left":
                job, choice = rows[row]
                job.tell(Ended(choice, completion))

        def lost(row: int, error: GenerationError) -> None:
            if row < len(rows):
                LOG.error("%s", error)
                rows[row][0].tell(RequestError(500, str(error)))

        system.complete(
            self._params,
            prompts,
            max_new_tokens=_power(max(FEWEST_NEW_TOKENS, *(job.max_new_tokens for job in jobs)), 2),
            names=["the request"] * len(filled),
            sampling=[job.sampling for job, _ in filled],
            rows=[choice for _, choice in filled],
            settings=settings,
            on_text=text,
            on_answer=answer,
            on_nan=lost,
            chunk=self._chunk,
            cache_dtype=self._cache_dtype,
        )


def _tell(jobs: Sequence[Job], error: RequestError) -> None:
    for job in jobs:
        job.tell(error)


def _num_rows(jobs: Sequence[Job]) -> int:
    return sum(job.num_choices for job in jobs)


def _power(number: int, base: int) -> int:
    """The smallest power of `base` that is at least `number`."""
    power = 1
    while power < number:
        power *= base
    return power
