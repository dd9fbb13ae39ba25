"""What a worker of Ray does with one task. This module imports no JAX: the chips are chosen before that is imported."""

import dataclasses
import fcntl
import importlib
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Chips of a host as libtpu lays them out, by their number.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
REPORT_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task came to in its worker.

    Attributes:
      value: what its call returned.
      error: what its call raised; None if it returned.
      stopped: whether the worker was lost, or was stopped by SIGTERM and saved, so that another can resume.
    """

    value: Any = None
    error: Exception | None = None
    stopped: bool = False


class Reports:
    """An actor: what workers said last of each run, until the sweep takes it."""

    def __init__(self):
        self._latest: dict[tuple[str, str], tuple[int, str]] = {}

    def put(self, label: str, run: str, done: int, note: str) -> None:
        self._latest[label, run] = done, note

    def take(self) -> list[tuple[str, str, int, str]]:
        """(label of the task, run, units done, note) of what was put since the last call."""
        taken, self._latest = self._latest, {}
        return [(*names, *said) for names, said in taken.items()]


class Reporter:
    """The report of a task, sent about once a second.

    Args:
      label: of the task.
      reports: a handle of the actor `Reports`.
    """

    def __init__(self, label: str, reports: Any):
        self._label, self._reports, self._next = label, reports, 0.0

    def __call__(self, run: str, done: int, note: str) -> None:
        if time.monotonic() >= self._next:
            self._reports.put.remote(self._label, run, done, note)
            self._next = time.monotonic() + REPORT_SECONDS


def chip_environment(kind: str | None, ids: Sequence[str]) -> dict[str, str]:
    """Variables with which JAX sees only some chips of a host, as a host of its own.

    Args:
      kind: "TPU", "GPU", or None for none of them.
      ids: the chips' numbers on the host; for TPUs 1, 2, 4 or 8, neighbours.

    Source: libtpu's variables as in https://github.com/jax-ml/jax/issues/8809 and 14977, under both of their names.
    """
    if kind == "GPU":
        return {"CUDA_VISIBLE_DEVICES": ",".join(ids)}
    if kind is None:
        return {}
    bounds = TPU_BOUNDS[len(ids)]
    per_host = dict.fromkeys(("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_CHIPS_PER_HOST_BOUNDS"), bounds)
    hosts = dict.fromkeys(("TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS"), "1,1,1")
    return {"TPU_VISIBLE_CHIPS": ",".join(ids), **per_host, **hosts}


def hold_chips(kind: str | None, ids: Sequence[str]) -> None:
    """Waits until no other process of this user has the chips, and holds them until this process ends.

    A chip serves one process, and Ray gives it to the next while the last one is still ending.
    """
    for name in ids:
        path = os.path.join(tempfile.gettempdir(), f"vlm_jax-{os.getuid()}-{kind}-{name}.lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # never closed
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _log.info("waiting for another process that has %s %s", kind, name)
            fcntl.flock(handle, fcntl.LOCK_EX)


def work(label: str, call: bytes, kind: str | None, folder: str, reports: Any) -> Result:
    """Runs a task in a process that has run nothing else.

    Args:
      label: of the task.
      call: the pickled call of an `executor.Task`.
      kind: "TPU" or "GPU", of which Ray gave the process some; None for neither.
      folder: the sweep's working directory, in which relative paths of its config are.
      reports: a handle of the actor `Reports`.
    """
    ray = importlib.import_module("ray")
    show_messages()
    ids = sorted(ray.get_runtime_context().get_accelerator_ids().get(kind, []))
    hold_chips(kind, ids)
    os.environ |= chip_environment(kind, ids)
    try:
        os.chdir(folder)
        return Result(pickle.loads(call)(Reporter(label, reports)))
    except Exception as error:  # of whatever kind: it is the point's
        stopped = _is_named(error, "vlm_jax.train.loop", "Interrupted")
        if not stopped and not _is_named(error, "vlm_jax.sweep.executor", "Stopped"):
            _log.info("%s failed", label, exc_info=True)
        return Result(error=portable(error), stopped=stopped)


def _is_named(error: Exception, module: str, name: str) -> bool:
    """Whether the error is of a class of a module, which is not imported for that."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def show_messages() -> None:
    """Shows this package's messages once, which Ray prints where the command runs; the root has other handlers."""
    messages = logging.getLogger("vlm_jax")
    messages.setLevel(logging.INFO)
    messages.addHandler(logging.StreamHandler())
    messages.propagate = False


def portable(error: Exception) -> Exception:
    """The error without its traceback; as a RuntimeError where it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever kind: an exception's own methods
        return RuntimeError(f"{type(error).__name__}: {error}")
