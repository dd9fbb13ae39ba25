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
from collections.abc import Generator, Iterable, Sequence
from typing import Any, cast

import jax

from vlm_jax.config import ConfigError
from vlm_jax.layers.platform import platform
from vlm_jax.sweep.executor import Ended, Report, Task, sigterm
from vlm_jax.sweep.ray_worker import portable
from vlm_jax.train.loop import Interrupted

POLL_SECONDS = 0.5
# Settings of JAX that flags of this process have set, which a worker needs as well.
SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_platforms")

_log = logging.getLogger(__name__)


class ProcessLost(RuntimeError):
    """The process of a point ended without a result: it was killed, or ran out of memory."""


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
    """A process and its end of the pipe.

    Attributes:
      process, pipe: of the worker.
      task: what it runs; None while it is idle.
    """

    process: Any
    pipe: Any
    task: Task | None = None


class ProcessExecutor:
    """Runs tasks in processes of this host, one in each at a time; see `executor.Executor`.

    Args:
      num_processes: at most the number of CPUs.

    Raises:
      ConfigError: more processes than CPUs, or devices that cannot be divided so.
    """

    in_process = False

    def __init__(self, num_processes: int):
        if platform() != "cpu":
            raise ConfigError(
                "--processes: divides CPUs; omit it, or use --executor=ray, which divides the chips of a host"
            )
        self._shares = divided(own_cpus(), num_processes)
        self._context = multiprocessing.get_context("spawn")

    def run(self, tasks: Iterable[Task], report: Report) -> Generator[Ended, None, None]:
        waiting, ended = list(tasks), set[str]()
        shares = [len(share) for share in self._shares]
        _log.info("points run in %d processes of %s CPUs", len(shares), " and ".join(map(str, shares)))
        workers = [self._start(share) for share in self._shares]
        try:
            with sigterm() as stopped:
                while waiting or any(worker.task for worker in workers):
                    for number, worker in enumerate(workers):
                        ready = next((task for task in waiting if ended.issuperset(task.after)), None)
                        if worker.task is None and ready is not None:
                            waiting.remove(ready)
                            if not worker.process.is_alive():
                                worker = workers[number] = self._start(self._shares[number])
                            worker.task = ready
                            worker.pipe.send((ready.label, pickle.dumps(ready.call)))
                    for found in self._heard(workers, report):
                        ended.add(found.label)
                        yield found
                    if stopped.is_set():
                        raise Interrupted("stopped by SIGTERM, and points resume from their newest checkpoints")
        finally:
            for worker in workers:
                worker.process.terminate()  # a run saves its state
                worker.pipe.close()
            for worker in workers:
                worker.process.join()

    def _start(self, cpus: tuple[int, ...]) -> _Worker:
        ours, theirs = self._context.Pipe()
        settings = {name: getattr(jax.config, name) for name in SETTINGS}
        process = self._context.Process(target=_work, args=(theirs, cpus, settings, os.getcwd()))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _heard(self, workers: Sequence[_Worker], report: Report) -> Generator[Ended, None, None]:
        """What busy workers have said: reports are passed on, tasks that ended are yielded."""
        busy = {worker.pipe: worker for worker in workers if worker.task}
        for pipe in cast(list[Any], multiprocessing.connection.wait(list(busy), timeout=POLL_SECONDS)):
            worker = busy[pipe]
            assert worker.task is not None
            label = worker.task.label
            try:
                said = pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                told = f"{label}: its process ended with status {worker.process.exitcode}, -9 being out of memory"
                said = Ended(label, error=ProcessLost(told))
            if not isinstance(said, Ended):
                report(*said)
                continue
            worker.task = None
            if isinstance(said.error, Interrupted):
                raise said.error
            yield said


def _work(pipe: Any, cpus: tuple[int, ...], settings: dict[str, Any], folder: str) -> None:
    """Runs the calls that come through a pipe until the process is ended."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # before JAX counts its threads
    for name, value in settings.items():
        jax.config.update(name, value)
    logging.basicConfig(format="%(message)s")
    os.chdir(folder)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            label, call = pipe.recv()
            try:
                pipe.send(Ended(label, pickle.loads(call)(functools.partial(_report, pipe))))
            except Exception as error:  # of whatever kind: it is the point's
                pipe.send(Ended(label, error=portable(error)))


def _report(pipe: Any, run: str, done: int, note: str) -> None:
    pipe.send((run, done, note))
