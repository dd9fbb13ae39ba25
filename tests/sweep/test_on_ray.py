"""How a Ray cluster is divided among points, and what its workers are told; no cluster is started."""

import contextlib
import os
import signal
import sys
import types

import pytest

from vlm_jax.cli import executors
from vlm_jax.config import ConfigError
from vlm_jax.sweep.executor import Ended, LocalExecutor, Task
from vlm_jax.sweep.on_ray import (
    TRIES,
    Losses,
    RayExecutor,
    RaySettings,
    Share,
    WorkerLost,
    divide,
    environment,
    ray_executor,
)
from vlm_jax.sweep.ray_worker import Result, chip_environment
from vlm_jax.train.loop import Interrupted

from ..advice import tried

TPU, GPU = {"CPU": 112.0, "TPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}
ONE_BY_ONE = "the points of a host run one after another"


@pytest.mark.parametrize(
    ("hosts", "chips", "cpus", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}], None, None, (None, 0, 4, "3 in all")),
        ([{"CPU": 8.0}], None, 8, (None, 0, 8, f"{ONE_BY_ONE}, 1 at a time in all")),
        ([{"CPU": 8.0}, TPU], 1, None, ("TPU", 1, 28, "a point takes 1 of the 4 TPU chips of a host; 4 points")),
        ([TPU, TPU], 2, 5, ("TPU", 2, 5, "2 points of a host run at a time, 4 in all")),
        ([TPU, TPU], None, None, ("TPU", 4, 112, f"{ONE_BY_ONE}, 2 at a time in all")),
        (
            [TPU],
            3,
            None,
            ("TPU", 4, 112, f"3 chips cannot be cut out of a host (1, 2, 4 and 8 can); {ONE_BY_ONE}"),
        ),
        ([GPU], 3, None, ("GPU", 3, 6, "a point takes 3 of the 8 GPUs of a host; 2 points")),
        ([GPU, {"CPU": 2.0, "GPU": 1.0}], None, None, ("GPU", 1, 2, "9 in all")),
    ],
)
def test_hosts_are_divided(hosts, chips, cpus, expected):
    share = divide(hosts, RaySettings(chips_per_point=chips, cpus_per_point=cpus))
    assert (share.kind, share.chips, share.cpus) == expected[:3]
    assert expected[3] in share.said


@pytest.mark.parametrize(
    ("hosts", "settings", "message"),
    [
        ([TPU], {"chips_per_point": 8}, "--chips_per_point: expected at most 4, the TPU chips of a host, got 8"),
        ([GPU], {"chips_per_point": 9}, "--chips_per_point: expected at most 8, the GPUs of a host, got 9"),
        ([{"CPU": 2.0}], {"cpus_per_point": 3}, "--cpus_per_point: expected at most 2, the CPUs of a host, got 3"),
    ],
)
def test_more_than_a_host_has_is_refused(hosts, settings, message):
    with pytest.raises(ConfigError, match=message):
        divide(hosts, RaySettings(**settings))


def test_chips_or_cpus_that_are_not_there_are_told():
    with pytest.raises(ConfigError, match=tried("have no TPU and no GPU; omit the flag")):
        divide([{"CPU": 2.0}], RaySettings(chips_per_point=1))
    assert divide([{"CPU": 2.0}], RaySettings()).cpus == 2
    with pytest.raises(ConfigError, match=tried("has a CPU for points; add one")):
        divide([{"memory": 1.0}], RaySettings())
    with pytest.raises(ConfigError, match=r"--chips_per_point: expected at least 1"):
        RaySettings(chips_per_point=0)


@pytest.mark.parametrize(
    ("ids", "bounds"), [(["2"], "1,1,1"), (["2", "3"], "1,2,1"), (list("0123"), "2,2,1"), (list("01234567"), "2,4,1")]
)
def test_a_process_sees_its_tpu_chips_as_a_host_of_its_own(ids, bounds):
    found = chip_environment("TPU", ids)
    assert found["TPU_VISIBLE_CHIPS"] == ",".join(ids)
    assert found["TPU_CHIPS_PER_PROCESS_BOUNDS"] == found["TPU_CHIPS_PER_HOST_BOUNDS"] == bounds
    x, y, z = map(int, bounds.split(","))
    assert x * y * z == len(ids) and found["TPU_PROCESS_BOUNDS"] == found["TPU_HOST_BOUNDS"] == "1,1,1"
    assert chip_environment("GPU", ids) == {"CUDA_VISIBLE_DEVICES": ",".join(ids)}
    assert chip_environment(None, []) == {}


def test_a_process_has_the_platform_and_threads_of_its_share(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    found = environment(Share("GPU", 1, 3, ""))
    assert {found[name] for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert found["JAX_PLATFORMS"] == "cuda,cpu" and found["JAX_ENABLE_X64"] == "0"
    assert found["XLA_FLAGS"] == os.environ["XLA_FLAGS"] and "HOME" not in found
    assert environment(Share(None, 0, 0, ""))["NPROC"] == "1"
    assert environment(Share(None, 0, 0, ""))["JAX_PLATFORMS"] == "cpu"  # whatever this process has


def test_losses_are_counted_until_a_task_gets_further():
    losses = Losses()
    assert [losses.may_try_again("a") for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]
    losses.progressed("b", 7)
    assert [losses.may_try_again("b") for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]
    losses.progressed("b", 6)  # again, from an earlier checkpoint
    assert not losses.may_try_again("b")
    losses.progressed("b", 8)
    assert losses.may_try_again("b")


class Scripted(RayExecutor):
    """The executor, whose workers end in the order of their start, with what a script says of each try."""

    def __init__(self, script, stop=None):
        self._script, self._stop = {label: iter(results) for label, results in script.items()}, stop
        self.submitted, self.cancelled = [], []
        self._ray = types.SimpleNamespace(wait=self._wait, cancel=lambda label, force: self.cancelled.append(label))

    def _wait(self, running, timeout):
        if self._stop in running:
            os.kill(os.getpid(), signal.SIGTERM)
        return running[:1], running[1:]

    def _submit(self, task, reports):
        self.submitted.append(task.label)
        return task.label

    def _reports(self):
        return None

    def _told(self, reports):
        return [(label, f"run of {label}", 0, "note") for label in self.submitted[-1:]]

    def _result(self, handle):
        return next(self._script[handle])


LOST, NO = Result(error=WorkerLost("gone"), stopped=True), ValueError("no")


def tasks_of(**after):
    return [Task(label, print, tuple(names)) for label, names in after.items()]


def test_a_lost_task_is_tried_again_and_what_is_after_it_waits():
    executor = Scripted({"shared": [LOST, Result()], "a": [Result(1)], "b": [Result(error=NO)], "c": [LOST] * TRIES})
    tasks, told = tasks_of(shared=(), c=(), a=("shared",), b=("a",)), []
    every = executor.run(tasks, lambda *said: told.append(said))
    assert next(every) == Ended("shared") and executor.submitted[:3] == ["shared", "c", "shared"]
    assert next(every) == Ended("a", 1)
    assert list(every) == [Ended("b", error=NO), Ended("c", error=LOST.error)]
    assert executor.submitted.count("c") == TRIES and executor.submitted.index("a") > 2
    assert ("run of a", 0, "note") in told and not executor.cancelled


def test_what_runs_is_cancelled_when_the_command_is_stopped_or_gives_up():
    executor = Scripted({"a": [Result()], "b": []}, stop="a")
    before = signal.getsignal(signal.SIGTERM)
    every = executor.run(tasks_of(a=(), b=()), print)
    assert next(every) == Ended("a")  # what has ended is kept
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        next(every)
    assert executor.cancelled == ["b"] and signal.getsignal(signal.SIGTERM) is before
    executor = Scripted({"a": [Result(error=NO)], "b": []}, stop="a")
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):  # the error may be that of the signal
        next(executor.run(tasks_of(a=(), b=()), print))
    assert executor.cancelled == ["b"]
    executor = Scripted({"a": [Result()], "b": []})
    with contextlib.closing(executor.run(tasks_of(a=(), b=()), print)) as every:
        assert next(every) == Ended("a")
    assert executor.cancelled == ["b"]


def test_ray_is_needed_only_for_its_executor(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    wanted = tried("Ray is not installed; pip install 'vlm_jax[ray]', or omit the flag")
    with pytest.raises(ConfigError, match=wanted), ray_executor(RaySettings()):
        pass


class Flag:
    def __init__(self, name, value):
        self.name, self.value = name, value


def test_flags_of_ray_go_with_it(monkeypatch):
    for name in ("EXECUTOR", "RAY_ADDRESS", "CHIPS_PER_POINT", "CPUS_PER_POINT"):
        monkeypatch.setattr(executors, name, Flag(name.lower(), None))
    with executors.open_executor() as executor:
        assert isinstance(executor, LocalExecutor)
    with monkeypatch.context() as patch:
        patch.setattr(executors, "CHIPS_PER_POINT", Flag("chips_per_point", 2))
        wanted = tried("--{chips_per_point}: only with --executor=ray; add it, or omit the flag")
        with pytest.raises(ConfigError, match=wanted), executors.open_executor():
            pass
    monkeypatch.setattr(executors, "EXECUTOR", Flag("executor", "ray"))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with (
        pytest.raises(ConfigError, match=tried("a point is one process; omit --distributed")),
        executors.open_executor(),
    ):
        pass
