"""Runs points in several processes of this host, which divide its CPUs: small steps leave most of many CPUs idle."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, cast

import jax

from vlm_jax.config import ConfigError
from vlm_jax.layers.platform import platform
from vlm_jax.sweep.executor import CACHE_SETTINGS, STOPPED, Ended, Report, Task, sigterm
from vlm_jax.sweep.ray_worker import portable, show_messages
from vlm_jax.train.loop import Interrupted

POLL_SECONDS = 0.5
SAVE_SECONDS = 60  # for runs that are stopped
SETTINGS = (*CACHE_SETTINGS, "jax_platforms")

_log = logging.getLogger(__name__)


class ProcessLost(RuntimeError):
    """The process of a point ended without a result."""


def divided(cpus: Sequence[int], num_processes: int) -> list[tuple[int, ...]]:
    """The CPUs of each process: neighbours, as many for each as can be.

    Raises:
      ConfigError: more processes than CPUs.
    """
    if num_processes > len(cpus):
        raise ConfigError(f"--processes: expected at most {len(cpus)}, the CPUs of this process, got {num_processes}")
    ends = [len(cpus) * number // num_processes for number in range(num_processes + 1)]
    return [tuple(cpus[start:end]) for start, end in itertools.pairwise(ends)]


def own_cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclasses.dataclass
class _Worker:
    """A process and this process's end of its pipe.

    Attributes:
      task: what it runs; None while it is idle.
      last: label of the newest task that it has run.
    """

    process: Any
    pipe: Any
    task: Task | None = None
    last: str = ""


class ProcessExecutor:
    """Runs tasks in processes of this host, one in each at a time; see `executor.Executor`.

    A task whose process is lost fails, and a new process takes the place of that one.

    Args:
      num_processes: at most the number of CPUs.

    Raises:
      ConfigError: more processes than CPUs, or devices that cannot be divided so.
    """

    in_process = False

    def __init__(self, num_processes: int):
        if platform() != "cpu":
            raise ConfigError("--processes: divides CPUs; set it to 1, or use --executor=ray to divide chips")
        self._shares = divided(own_cpus(), num_processes)
        self._context = multiprocessing.get_context("spawn")

    def run(self, tasks: Iterable[Task], report: Report) -> Generator[Ended, None, None]:
        waiting, ended = list(tasks), set[str]()
        counts = " and ".join(str(len(share)) for share in self._shares)
        _log.info("points run in %d processes of %s CPUs", len(self._shares), counts)
        workers: list[_Worker] = []
        try:
            workers += map(self._start, self._shares)
            with sigterm() as stopped:
                while waiting or any(worker.task for worker in workers):
                    self._hand_out(waiting, ended, workers)
                    for one in self._poll(workers, report):
                        if stopped.is_set() and one.error is not None:
                            break
                        ended.add(one.label)
                        yield one
                    if stopped.is_set():
                        raise Interrupted(STOPPED)
        finally:
            _end(workers)

    def _start(self, cpus: tuple[int, ...]) -> _Worker:
        ours, theirs = self._context.Pipe()
        settings = {name: getattr(jax.config, name) for name in SETTINGS}
        process = self._context.Process(target=_work, args=(theirs, settings, os.getcwd()))
        with _bound_to(cpus):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self, waiting: list[Task], ended: set[str], workers: list[_Worker]) -> None:
        """Gives a task to every idle worker, as far as there are tasks that can run.

        One whose last `after` a worker ran last goes to that, which has kept the parameters.
        """
        idle = [number for number, worker in enumerate(workers) if worker.task is None]
        able = [task for task in waiting if ended.issuperset(task.after)]
        given = {
            number: next((task for task in able if task.after[-1:] == (workers[number].last,)), None) for number in idle
        }
        for number in idle:
            others = [task for task in able if task not in given.values()]
            ready = given[number] or next(iter(others), None)
            if ready is None:
                continue
            given[number], worker = ready, workers[number]
            waiting.remove(ready)
            if not worker.process.is_alive():
                worker.pipe.close()
                worker = workers[number] = self._start(self._shares[number])
            worker.task = ready
            with contextlib.suppress(OSError):  # a process that has just ended is found by `_poll`
                worker.pipe.send((ready.label, pickle.dumps(ready.call)))

    def _poll(self, workers: Sequence[_Worker], report: Report) -> Iterator[Ended]:
        """Passes on what busy workers report, and yields the tasks that ended."""
        busy = {worker.pipe: worker for worker in workers if worker.task}
        for pipe in cast(list[Any], multiprocessing.connection.wait(list(busy), timeout=POLL_SECONDS)):
            worker = busy[pipe]
            assert worker.task is not None
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                message = Ended(worker.task.label, error=_loss(worker.process.exitcode))
            if not isinstance(message, Ended):
                report(*message)
                continue
            worker.task, worker.last = None, message.label
            if isinstance(message.error, Interrupted):
                raise message.error
            yield message


def _loss(status: int) -> Exception:
    """The error of a task whose process ended with a status."""
    if status == -signal.SIGTERM:
        return Interrupted(STOPPED)
    cause = " (SIGKILL, often for lack of memory)" if status == -signal.SIGKILL else ""
    return ProcessLost(f"its process ended with status {status}{cause}")


@contextlib.contextmanager
def _bound_to(cpus: Sequence[int]) -> Iterator[None]:
    """Binds this thread to CPUs inside the `with`; a process that it starts inherits them before it counts them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(workers: Sequence[_Worker]) -> None:
    """Ends the processes; a training saves its state before."""
    end = time.monotonic() + SAVE_SECONDS
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        with contextlib.suppress(EOFError, OSError):
            # What it reports is read, so that it does not wait before it saves.
            while time.monotonic() < end and not (worker.pipe.poll(0.1) and isinstance(worker.pipe.recv(), Ended)):
                pass
        worker.pipe.close()
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(pipe: Any, settings: dict[str, Any], folder: str) -> None:
    """Runs the calls that come through a pipe until this process is ended, or the one that started it has ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    show_messages()
    for name, value in settings.items():
        jax.config.update(name, value)
    os.chdir(folder)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            label, call = pipe.recv()
            try:
                ended = Ended(label, pickle.loads(call)(functools.partial(_report, pipe)))
            except Exception as error:  # of whatever kind: it is the point's
                ended = Ended(label, error=portable(error))
            pipe.send(ended)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _report(pipe: Any, run: str, done: int, note: str) -> None:
    with contextlib.suppress(OSError):  # of a process that is lost: this one is about to be stopped
        pipe.send((run, done, note))
