"""Ends a run of several processes where one of them died or hangs, with a message that names it and its step.

Every process writes a small file into `WORKDIR/heartbeats` from a thread; the first process joins them in one file, the
board, which the others read. What is judged is whether a file has changed, by the reader's own clock. Files, and not
the key-value store of `jax.distributed`, since that ends with process 0; where process 0 is killed, though, JAX itself
aborts the others within a second, and the files remain to tell who was where.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from vlm_jax.sharding.processes import any_process, wait_for_all
from vlm_jax.train.workdir import WorkdirError
from vlm_jax.types import Fields

HEARTBEATS, BOARD = "heartbeats", "all.json"  # folder of a workdir, and the file of all processes in it
# Of the time after which a process counts as lost: what judges, and how often the files are written and read.
_LIMIT, _INTERVAL = 0.6, 0.1
_ALONE = re.compile(r"Gloo|NCCL|closed by peer|UNAVAILABLE|DEADLINE_EXCEEDED|oordination service|Socket closed")

_log = logging.getLogger(__name__)


class HostLost(RuntimeError):
    """Another process of the run died or hangs; the message names it, its host and its step."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """What one process says of itself.

    Attributes:
      process: its index.
      place: its host and process id, for people.
      count: beats so far.
      step: the last step that it started.
      is_stepping: whether it is between two steps, so that it must go on with the others; else it compiles, saves,
        evaluates or waits.
      ended: None while it runs; empty when it has ended as it should, else why it ended.
    """

    process: int
    place: str
    count: int = 0
    step: int = 0
    is_stepping: bool = False
    ended: str | None = None


class Judge:
    """Decides which other processes are lost.

    Args:
      mine: index of this process.
      limit: seconds without a new beat, or without a step that others have started, after which one is lost if this
        process has started no step for as long either.
    """

    def __init__(self, mine: int, limit: float):
        self._mine, self._limit = mine, limit
        self._beaten: dict[int, tuple[int, float]] = {}  # count, and when it was new
        self._moved: dict[int, tuple[int, float]] = {}  # step, and when the process was first seen to be held up at it
        self._rested: dict[int, tuple[int, float, int]] = {}  # the same of one that is not stepping, and times told
        self._own: tuple[int, float] | None = None  # step of this process, and when it was new

    def forget(self) -> None:
        """Begins anew, where this process itself could not look."""
        self._beaten, self._moved, self._rested, self._own = {}, {}, {}, None

    def verdict(self, beats: Mapping[int, Beat], own: Beat, now: float) -> str | None:
        """What is said of the lost processes, or None.

        Args:
          beats: of the other processes, as far as they can be read.
          own: of this process.
          now: seconds of a clock that never goes back.
        """
        ahead = max([own.step, *(beat.step for beat in beats.values())])
        if self._own is None or self._own[0] != own.step:
            self._own = own.step, now
        stalled = now - self._own[1]  # a run that goes on has lost nobody, whatever its files say
        found = {}
        for index, beat in beats.items():
            if index == self._mine or beat.ended == "":
                continue
            if beat.count != self._beaten.get(index, (None,))[0]:
                self._beaten[index] = beat.count, now
            behind = beat.is_stepping and beat.step < ahead
            if not behind:
                self._moved.pop(index, None)
            elif beat.step != self._moved.get(index, (None,))[0]:
                self._moved[index] = beat.step, now
            silent = now - self._beaten[index][1]
            late = now - self._moved[index][1] if behind else 0.0
            if beat.ended is not None and min(silent, stalled) >= self._limit:
                found[index] = f"ended at step {beat.step}: {beat.ended}"
            elif min(silent, stalled) >= self._limit:
                found[index] = f"has given no sign of life for {silent:.0f} seconds, and was at step {beat.step} then"
            elif min(late, stalled) >= self._limit:
                found[index] = f"has been at step {beat.step} for {late:.0f} seconds, while others are at step {ahead}"
        if 0 in found:  # what is known of the others came through it
            found = {0: found[0]}
        said = [f"process {index} ({beats[index].place}) {text}" for index, text in sorted(found.items())]
        return "; ".join(said) or None

    def warnings(self, beats: Mapping[int, Beat], own: Beat, now: float) -> list[str]:
        """What is said, once in every `limit`, of other processes that are long at what may take any time.

        Args:
          beats, own, now: as of `verdict`.
        """
        ahead, said = max([own.step, *(beat.step for beat in beats.values())]), []
        for index, beat in sorted(beats.items()):
            if index == self._mine or beat.is_stepping or beat.step >= ahead or beat.ended is not None:
                self._rested.pop(index, None)
                continue
            step, since, told = self._rested.get(index, (None, now, 0))
            if step != beat.step:
                since, told = now, 0
            if now - since >= (told + 1) * self._limit:
                told = int((now - since) / self._limit)
                said.append(
                    f"process {index} ({beat.place}) is not stepping since step {beat.step} for {now - since:.0f} "
                    f"seconds (it compiles, saves, reads or evaluates), while others are at step {ahead}"
                )
            self._rested[index] = beat.step, since, told
        return said


class Watchdog:
    """Watches the other processes of a run from a thread, from which it ends this one: a step cannot be interrupted.

    Args:
      workdir: of the run, which all processes see, local or `gs://`.
      seconds: time within which a lost process is named; 0 to watch nothing.
      end: called with the verdict; ends the process.
    """

    def __init__(self, workdir: epath.Path, seconds: float, end: Callable[[HostLost], None] = lambda lost: _end(lost)):
        self._folder, self._seconds, self._end = workdir / HEARTBEATS, seconds, end
        self._is_on = seconds > 0 and jax.process_count() > 1
        self._beat = Beat(jax.process_index(), f"process id {os.getpid()} on {socket.gethostname()}")
        self._count, self._known = 0, dict[int, Beat]()
        self._closed = threading.Event()

    def at(self, step: int) -> None:
        """A step is started; from here on this process must go on with the others."""
        self._beat = dataclasses.replace(self._beat, step=step, is_stepping=True)

    def pause(self, step: int | None = None) -> None:
        """What follows is not a step, and may take any time: a compilation, a checkpoint, an evaluation.

        Args:
          step: the last one, where it was taken by an earlier start of the run; None for that of `at`.
        """
        step = self._beat.step if step is None else step
        self._beat = dataclasses.replace(self._beat, step=step, is_stepping=False)

    @contextlib.contextmanager
    def held(self, *fine: type[BaseException]) -> Iterator[None]:
        """Watches inside the `with`; all processes enter it alike.

        Args:
          fine: exceptions by which a process may end alone.

        Raises:
          WorkdirError: the processes do not see the same workdir; in all of them.
        """
        if not self._is_on:
            yield
            return
        self._closed.clear()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._meet()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except fine:
            self._close(thread, "")
            raise
        except BaseException as error:
            if _is_of_others(error):  # the thread finds out who it was, and ends this process
                thread.join(2 * self._seconds)
            self._close(thread, f"{type(error).__name__}: {error}"[:1000])
            raise
        else:
            self._close(thread, "")

    def _meet(self) -> None:
        """Writes the first beats and the first board; all processes call this alike."""
        failure: WorkdirError | None = None
        self._write()
        wait_for_all("heartbeats are written")
        if self._beat.process == 0:
            missing = [index for index in range(jax.process_count()) if not self._path(index).exists()]
            if missing:
                failure = self._apart(missing[0])
            else:
                self._post(self._read_all(), None)
        wait_for_all("heartbeats are joined")
        if self._beat.process > 0:
            try:
                self._read_board()
            except FileNotFoundError:
                failure = self._apart(0)
        if any_process(failure is not None):
            raise failure or self._apart(None)

    def _apart(self, index: int | None) -> WorkdirError:
        """The error of processes that do not see the same folder."""
        whose = "another process's" if index is None else f"process {index}'s"
        return WorkdirError(
            f"{whose} heartbeat is not in {self._folder}, which all hosts must see; pass the same --workdir on all of "
            "them, in a shared file system or a bucket"
        )

    def _close(self, thread: threading.Thread, ended: str) -> None:
        self._closed.set()
        thread.join()
        self._say_ended(ended)

    def _say_ended(self, ended: str, lost: str | None = None) -> None:
        """Writes the last beat, and as the first process the verdict on the board, if they can be written."""
        try:
            self._write(ended)
            if self._beat.process == 0:
                self._post(self._read_all(), lost)
        except Exception as error:  # a store's errors are of many types
            _log.warning("%s: cannot be written (%s)", self._folder, error)

    def _watch(self) -> None:
        interval, judge = _INTERVAL * self._seconds, Judge(self._beat.process, _LIMIT * self._seconds)
        last, is_told = time.monotonic(), False
        while not self._closed.wait(interval):
            now = time.monotonic()
            if now - last > 3 * interval:  # this process was stopped, or its store was slow
                judge.forget()
            last = now
            try:
                lost = self._look(judge, now)
            except Exception as error:  # a store's errors are of many types
                judge.forget()
                if not is_told:
                    _log.warning("%s: cannot be read or written (%s), so nothing is watched", self._folder, error)
                is_told = True
                continue
            if lost is not None:
                self._say_ended(f"HostLost: {lost}", lost)
                if self._beat.process == 0:  # it ends last, since JAX aborts the others then
                    time.sleep(2 * interval)
                self._end(HostLost(self._message(lost)))
                return

    def _look(self, judge: Judge, now: float) -> str | None:
        """Writes this process's beat, and reads those of the others."""
        own, lost = self._write(), None
        if own.process == 0:
            self._post(self._read_all(), None)
        else:
            lost, first = self._read_board(), self._known.get(0)
            if first is not None and first.ended == "":  # the board says no more
                return None
        for line in judge.warnings(self._known, own, now):
            _log.warning("%s", line)
        return lost or judge.verdict(self._known, own, now)

    def _message(self, lost: str) -> str:
        return (
            f"{lost}. Process {self._beat.process} ends at step {self._beat.step}, which cannot be made without it "
            "(config.loop.watchdog). Its log, or its host's, has the cause; rerun the same command on all hosts to "
            "resume from the newest checkpoint"
        )

    def _write(self, ended: str | None = None) -> Beat:
        """Writes the next beat; in place, since network file systems remember names longer than contents."""
        self._count += 1
        beat = dataclasses.replace(self._beat, count=self._count, ended=ended)
        self._path(beat.process).write_text(json.dumps(dataclasses.asdict(beat)))
        return beat

    def _read_all(self) -> Mapping[int, Beat]:
        """Beats of all processes."""
        paths = map(self._path, range(jax.process_count()))
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(_parsed, paths))
        self._known |= {index: Beat(**one) for index, one in enumerate(found) if one is not None}
        return self._known

    def _read_board(self) -> str | None:
        """Reads the beats on the board; returns the first process's verdict."""
        board = _parsed(self._folder / BOARD)
        if board is None:
            return None
        self._known = {one["process"]: Beat(**one) for one in board["beats"]}
        return board["lost"]

    def _path(self, index: int) -> epath.Path:
        return self._folder / f"{index}.json"

    def _post(self, beats: Mapping[int, Beat], lost: str | None) -> None:
        text = json.dumps({"lost": lost, "beats": [dataclasses.asdict(beat) for beat in beats.values()]})
        (self._folder / BOARD).write_text(text)


def _parsed(path: epath.Path) -> Fields | None:
    """The object in a JSON file; None where it is being written."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _is_of_others(error: BaseException) -> bool:
    """Whether an error, or a cause of it, is what the runtime raises where another process is gone."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError | ValueError) and _ALONE.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


def _end(lost: HostLost) -> None:
    print(f"{type(lost).__name__}: {lost}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # loads batches
        child.terminate()
    os._exit(1)  # not by an exception: the main thread waits for a step, and JAX would wait for the lost process
