"""Runs points on a Ray cluster: one process each, with chips of its own; a lost worker's point is tried again."""

import contextlib
import dataclasses
import importlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from vlm_jax.config import ConfigError, check_fields
from vlm_jax.ranges import Count
from vlm_jax.sweep.executor import CACHE_SETTINGS, STOPPED, Ended, Report, Task, sigterm
from vlm_jax.sweep.ray_worker import TPU_BOUNDS, Reports, Result, work
from vlm_jax.train.loop import Interrupted

TRIES = 5  # of a point whose workers are lost before it has got any further
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10
OBJECT_BYTES = 100 * 2**20  # of a local cluster's object store, which holds no more than configs and rows
PLATFORMS = {"TPU": "tpu,cpu", "GPU": "cuda,cpu", None: "cpu"}
THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # XLA reads NPROC

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """Where Ray runs, and what a point takes; the flags of `--executor=ray`.

    Attributes:
      ray_address: HOST:PORT of a cluster, or `auto` for the one of this host; a new cluster of this host if None, or
        that of the variable RAY_ADDRESS.
      chips_per_point: TPU chips or GPUs; all of a host if None.
      cpus_per_point: CPUs, also the number of threads; those that belong to its chips if None, or all of a host.
    """

    ray_address: str | None = None
    chips_per_point: Count | None = None
    cpus_per_point: Count | None = None

    def __post_init__(self):
        check_fields(self, "--")


@dataclasses.dataclass(frozen=True)
class Share:
    """What a point takes of a host.

    Attributes:
      kind: "TPU", "GPU", or None for CPUs only.
      chips: number of these.
      cpus: number of CPUs, which Ray counts.
      said: the division, for people.
    """

    kind: str | None
    chips: int
    cpus: int
    said: str


def divide(hosts: Sequence[Mapping[str, float]], settings: RaySettings) -> Share:
    """How the hosts of a cluster are divided among points.

    A number of TPU chips that cannot be cut out of a host (1, 2, 4 and 8 can) is raised to all of the host.

    Args:
      hosts: resources of each, as Ray names them.
      settings: what a point takes.

    Raises:
      ConfigError: no host has as much.
    """
    kind = next((kind for kind in ("TPU", "GPU") if any(host.get(kind, 0) >= 1 for host in hosts)), None)
    if kind is None:
        if settings.chips_per_point is not None:
            raise ConfigError("--chips_per_point: the hosts of the Ray cluster have no TPU and no GPU; omit the flag")
        counts = [int(host["CPU"]) for host in hosts if host.get("CPU", 0) >= 1]
        if not counts:
            raise ConfigError("--executor=ray: no host of the Ray cluster has a CPU for points; add one")
        cpus = settings.cpus_per_point or min(counts)
        if cpus > max(counts):
            raise ConfigError(f"--cpus_per_point: expected at most {max(counts)}, the CPUs of a host, got {cpus}")
        return Share(None, 0, cpus, f"a point takes {cpus} CPUs; {_at_once([count // cpus for count in counts])}")
    having = [host for host in hosts if host.get(kind, 0) >= 1]
    counts = [int(host[kind]) for host in having]
    unit, chips, why = "TPU chips" if kind == "TPU" else "GPUs", settings.chips_per_point or min(counts), ""
    if chips > max(counts):
        raise ConfigError(f"--chips_per_point: expected at most {max(counts)}, the {unit} of a host, got {chips}")
    if kind == "TPU" and chips not in TPU_BOUNDS:
        chips, why = min(counts), f", as {chips} chips cannot be cut out of a host (1, 2, 4 and 8 can)"
    cpus = settings.cpus_per_point or min(int(host.get("CPU", 0) * chips / host[kind]) for host in having)
    at_once = [int(host[kind]) // chips for host in having]
    if cpus:
        at_once = [min(count, int(host.get("CPU", 0)) // cpus) for count, host in zip(at_once, having, strict=True)]
    if not any(at_once):
        most = max(int(host.get("CPU", 0)) for host in having)
        raise ConfigError(f"--cpus_per_point: expected at most {most}, the CPUs of a host, got {cpus}")
    told = _at_once(at_once)
    return Share(kind, chips, cpus, f"a point takes {chips} of the {max(counts)} {unit} of a host{why}; {told}")


def _at_once(counts: Sequence[int]) -> str:
    if max(counts) == 1:
        return f"the points of a host run one after another, {sum(counts)} at a time in all"
    return f"{max(counts)} points of a host run at a time, {sum(counts)} in all"


@contextlib.contextmanager
def ray_executor(settings: RaySettings) -> Iterator["RayExecutor"]:
    """An executor on a cluster, to which this process is connected inside the `with`.

    JAX of this process then runs on the CPU, since a chip serves one process.

    Raises:
      ConfigError: Ray is not installed, the cluster cannot be reached, or no host has what a point takes.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--executor=ray: Ray is not installed; pip install 'vlm_jax[ray]', or omit the flag"
        ) from None
    jax.config.update("jax_platforms", "cpu")
    joined = ray.is_initialized()
    if not joined:
        _connect(ray, settings.ray_address or os.environ.get("RAY_ADDRESS"))
    try:
        share = divide([node["Resources"] for node in ray.nodes() if node["Alive"]], settings)
        _log.info("Ray: %s", share.said)
        yield RayExecutor(share)
    finally:
        if not joined:
            ray.shutdown()


def _connect(ray: ModuleType, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given: dict[str, Any] = {"logging_level": logging.WARNING}
    if address is None:
        given |= {"include_dashboard": False, "object_store_memory": OBJECT_BYTES}
    try:
        host, _, port = (address or "").rpartition(":")
        if host and port.isdigit() and "/" not in host:  # Ray itself tries for a minute
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address or "local", **given)
    except Exception as error:  # Ray raises all kinds
        if address is None:
            raise ConfigError(f"--executor=ray: Ray does not start on this host: {error}") from error
        raise ConfigError(
            f"--ray_address: no Ray cluster can be reached at {address}: {error}; start one there by `ray start "
            "--head`, or omit the flag for a cluster of this host"
        ) from error


class WorkerLost(RuntimeError):
    """The workers of a point were lost again and again."""


class Losses:
    """How often the workers of a task were lost one after another, without getting further than those before."""

    def __init__(self):
        self._furthest, self._then, self._times = Counter[str](), Counter[str](), Counter[str]()

    def progressed(self, label: str, done: int) -> None:
        """A task has done so many steps or questions."""
        self._furthest[label] = max(self._furthest[label], done)

    def may_try_again(self, label: str) -> bool:
        """Counts a loss, and says whether the task has tries left."""
        further = self._furthest[label] > self._then[label]
        self._times[label] = 1 if further else self._times[label] + 1
        self._then[label] = self._furthest[label]
        return self._times[label] < TRIES


class RayExecutor:
    """Runs each task in a fresh process of a cluster; see `executor.Executor`.

    A task whose worker or host is lost, or is stopped by SIGTERM, is tried again by another, which resumes from the
    checkpoints and answers in the workdir; all hosts need that, the data and the package at the same paths.

    Args:
      share: what a task takes of a host.
    """

    in_process = False

    def __init__(self, share: Share):
        self._ray, self._share = importlib.import_module("ray"), share

    def run(self, tasks: Iterable[Task], report: Report) -> Generator[Ended, None, None]:
        waiting, ended = list(tasks), set[str]()
        running: dict[Any, Task] = {}
        losses, reports = Losses(), self._reports()
        try:
            with sigterm() as stopped:
                while waiting or running:
                    for task in [task for task in waiting if ended.issuperset(task.after)]:
                        waiting.remove(task)
                        running[self._submit(task, reports)] = task
                    ready, _ = self._ray.wait(list(running), timeout=POLL_SECONDS)
                    for label, run, done, note in self._told(reports):
                        losses.progressed(label, done)
                        report(run, done, note)
                    for handle in ready:
                        task = running.pop(handle)
                        result = self._result(handle)
                        if stopped.is_set() and result.error is not None:
                            break
                        if result.stopped and losses.may_try_again(task.label):
                            _log.warning("%s: its worker was lost, it is tried again: %s", task.label, result.error)
                            waiting.append(task)
                            continue
                        ended.add(task.label)
                        yield Ended(task.label, result.value, result.error)
                    if stopped.is_set():
                        raise Interrupted(STOPPED)
        finally:
            for handle in running:
                self._ray.cancel(handle, force=True)

    def _told(self, reports: Any) -> list[tuple[str, str, int, str]]:
        """What workers said since the last call; nothing while the host of the actor is lost."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            return self._ray.get(reports.take.remote(), timeout=POLL_SECONDS)
        return []

    def _reports(self) -> Any:
        """A handle of the actor `Reports`, on this host."""
        here = self._ray.get_runtime_context().get_node_id()
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        place = strategies.NodeAffinitySchedulingStrategy(here, soft=True)
        return self._ray.remote(Reports).options(num_cpus=0, max_restarts=-1, scheduling_strategy=place).remote()

    def _submit(self, task: Task, reports: Any) -> Any:
        share, pickled = self._share, importlib.import_module("ray.cloudpickle").dumps(task.call)
        given: dict[str, Any] = {"num_cpus": share.cpus, "max_calls": 1, "max_retries": 0, "name": task.label}
        given["runtime_env"] = {"env_vars": environment(share)}
        if share.kind == "GPU":
            given["num_gpus"] = share.chips
        elif share.kind is not None:
            given["resources"] = {share.kind: share.chips}
        return self._ray.remote(**given)(work).remote(task.label, pickled, share.kind, os.getcwd(), reports)

    def _result(self, handle: Any) -> Result:
        """What came of a task; one whose process or host is gone is stopped."""
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:  # outside the task's own call
            return Result(error=RuntimeError(str(error)))
        except self._ray.exceptions.RayError as error:
            return Result(error=WorkerLost(f"{type(error).__name__}: {str(error).splitlines()[0]}"), stopped=True)


def environment(share: Share) -> dict[str, str]:
    """Variables of the process of a task: its platform and threads, and what this process has for JAX and XLA."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("JAX_") or name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }
    for name in CACHE_SETTINGS:
        if (value := getattr(jax.config, name)) is not None:
            kept[name.upper()] = str(value)
    threads = dict.fromkeys(THREADS, str(max(1, share.cpus)))
    return {**kept, **threads, "JAX_PLATFORMS": PLATFORMS[share.kind]}
