"""Where the points of a sweep or an evaluation are run: `Executor`, and the one of this process."""

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
from etils import epath

from vlm_jax.paths import is_remote
from vlm_jax.sharding.processes import is_primary
from vlm_jax.train.lock import WorkdirInUse, lock
from vlm_jax.train.loop import Interrupted

POINT_LOCK = "point.lock"
# Settings of JAX that a flag of the command has set, and a worker needs as well.
CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
STOPPED = "stopped by SIGTERM, and points resume from their newest checkpoints"
LEASE_SECONDS = 120  # NFS keeps the locks of a lost host for 90 seconds

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """A point was stopped before its end since others are better; the message says where."""


Report = Callable[[str, int, str], None]  # (run, steps or questions done of it, what it does)


@dataclasses.dataclass(frozen=True)
class Task:
    """A point, or the stages that points share.

    Attributes:
      label: its name in the sweep.
      call: runs it, and returns what `Ended.result` is; what it is made of can be pickled.
      after: labels of the tasks that have to end before, with or without an error; the last is the one whose process
        is the best for this task.
    """

    label: str
    call: Callable[[Report], Any]
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ended:
    """A task that ended.

    Attributes:
      label: of the task.
      result: what its call returned.
      error: what its call raised; None if it returned.
    """

    label: str
    result: Any = None
    error: Exception | None = None


@runtime_checkable
class Executor(Protocol):
    """Runs tasks.

    Attributes:
      in_process: whether tasks run in this process, one after another, in their order.
    """

    in_process: bool

    def run(self, tasks: Iterable[Task], report: Report) -> Generator[Ended, None, None]:
        """Yields every task once, as soon as it ended; stops what still runs when it is closed.

        Args:
          tasks: in an order in which each could run after those before it.
          report: is told how far the runs are, in this process.

        Raises:
          Interrupted: SIGTERM was received.
        """
        ...


class LocalExecutor:
    """Runs tasks in this process; a task is taken when the one before it has ended.

    Where several processes run, an error passes through: the others would wait for the one that went on.
    """

    in_process = True

    def run(self, tasks: Iterable[Task], report: Report) -> Generator[Ended, None, None]:
        for task in tasks:
            try:
                ended = Ended(task.label, task.call(report))
            except Exception as error:  # of whatever kind: the other points are still worth having
                together = jax.process_count() > 1 and not isinstance(error, Stopped)  # all processes stop a point
                if isinstance(error, Interrupted) or together:
                    raise
                ended = Ended(task.label, error=error)
            yield ended


@contextlib.contextmanager
def exclusive(folder: epath.Path, wait_seconds: float = LEASE_SECONDS) -> Iterator[Callable[[], None]]:
    """Holds the folder of a point inside the `with`; a lost worker may hold it until it notices that it is lost.

    Args:
      folder: created if missing.
      wait_seconds: how long to wait for another process.

    Yields:
      A function that raises WorkdirInUse if another process has taken the folder, where there are no locks.

    Raises:
      WorkdirInUse: another process still holds it.
    """
    if not is_primary():
        yield lambda: None
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if made and not is_remote(folder):
            stack.callback(_remove_empty, folder)
        end, said = time.monotonic() + wait_seconds, False
        while True:
            try:
                confirm = stack.enter_context(lock(folder / POINT_LOCK))
                break
            except WorkdirInUse as error:
                if time.monotonic() >= end:
                    raise
                if not said:
                    _log.info("waiting up to %g seconds: %s", wait_seconds, error)
                said = True
                time.sleep(1)
        yield confirm


def _remove_empty(folder: epath.Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that is set by SIGTERM inside the `with`; only the main thread can have it."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, previous)
