"""Tasks in processes that divide the CPUs: their order, their ends of every kind, and the rows of a sweep."""

import contextlib
import functools
import json
import os
import pickle
import signal
import types

import pytest

from vlm_jax.cli import executors
from vlm_jax.config import ConfigError
from vlm_jax.sweep import on_processes, point_run
from vlm_jax.sweep.executor import LocalExecutor, Task
from vlm_jax.sweep.on_processes import ProcessExecutor, divided, own_cpus
from vlm_jax.sweep.on_ray import RaySettings
from vlm_jax.sweep.point_run import PointRunner
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.run import Sweep
from vlm_jax.train.loop import Interrupted, Outcome

from ..advice import tried
from .test_run import new_console, tiny_sweep

TIMES = ("step_seconds", "prefill_seconds", "decode_seconds")


@pytest.mark.parametrize(
    ("cpus", "count", "expected"),
    [
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1], 1, [(0, 1)]),
        ([3, 5, 6, 7, 9], 2, [(3, 5), (6, 7, 9)]),
        (range(8), 3, [(0, 1), (2, 3, 4), (5, 6, 7)]),
    ],
)
def test_cpus_are_divided(cpus, count, expected):
    assert divided(cpus, count) == expected


def test_more_processes_than_cpus_are_refused():
    with pytest.raises(ConfigError, match="--processes: expected at most 2, the CPUs of this process, got 3"):
        divided([0, 1], 3)


@pytest.fixture
def opened(monkeypatch):
    """Opens the executor of flags with these values; the one of Ray is its settings."""

    def opens(**values):
        for name, value in {"executor": "local", "processes": 1, **values}.items():
            monkeypatch.setattr(executors, name.upper(), types.SimpleNamespace(name=name, value=value))
        monkeypatch.setattr(executors, "ray_executor", contextlib.nullcontext)
        with executors.open_executor() as executor:
            return executor

    return opens


def test_a_flag_of_another_executor_is_refused(opened):
    with pytest.raises(ConfigError, match=tried("--processes: only with --executor=local; omit the flag")):
        opened(executor="ray", processes=2)
    assert isinstance(opened(executor="ray"), RaySettings)


def test_chips_are_not_divided_by_processes(opened, monkeypatch):
    monkeypatch.setattr(on_processes, "platform", lambda: "gpu")
    told = tried("--processes: divides CPUs; set it to 1, or use --executor=ray to divide chips")
    with pytest.raises(ConfigError, match=told):
        opened(processes=2)
    assert isinstance(opened(), LocalExecutor) and isinstance(opened(executor="ray"), RaySettings)


def told(path, report):
    """Says its CPUs, and that it has begun."""
    report("run", 1, "begun")
    with open(path, "a") as file:
        file.write("begun\n")
    return sorted(os.sched_getaffinity(0))


def refused(report):
    raise ValueError("no")


def killed(report):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(report):
    raise Interrupted("saved")


def written(path, report):
    """What was written before it began."""
    with open(path) as file:
        return file.read()


def test_tasks_end_as_they_do_and_the_others_go_on(tmp_path):
    said, path = [], tmp_path / "said"
    tasks = [
        Task("killed", killed),
        Task("refused", refused),
        Task("told", functools.partial(told, path), ("killed",)),  # in a process that takes the lost one's place
        Task("after", functools.partial(written, path), ("told", "refused")),
    ]
    every = ProcessExecutor(2).run(tasks, lambda *given: said.append(given))
    ended = {one.label: one for one in every}
    assert list(ended)[-1] == "after" and ended["after"].result == "begun\n"
    assert said == [("run", 1, "begun")]
    cpus = own_cpus()
    assert tuple(ended["told"].result) in divided(cpus, 2)
    assert isinstance(ended["refused"].error, ValueError) and str(ended["refused"].error) == "no"
    assert str(ended["killed"].error).startswith("its process ended with status -9 (SIGKILL")


def process(report):
    return os.getpid()


def test_what_comes_after_a_task_runs_in_its_process():
    """So that it has the parameters of the training before it."""
    first = [Task(name, process) for name in ("a0", "b0")]
    rest = [Task(f"{name}{number}", process, ("b0", f"{name}{number - 1}")) for number in (1, 2) for name in "ba"]
    tasks = [*first, *rest]
    ended = {one.label: one.result for one in ProcessExecutor(2).run(tasks, print)}
    assert len(ended) == 6
    for name in "ab":
        assert len({ended[f"{name}{number}"] for number in range(3)}) == 1
    assert ended["a0"] != ended["b0"]


def test_a_worker_keeps_the_parameters_of_one_training(tmp_path, monkeypatch):
    points = {point.label: point for point in list_points(tiny_sweep())}
    runner = PointRunner(tiny_sweep().base, ("seeing",), tmp_path)
    first, second = (pickle.loads(pickle.dumps(runner)) for _ in range(2))
    assert first is second and first is not runner
    trained, labels = [], ["pool@1", "random@2"]

    class Trained(point_run.Trainer):
        def __init__(self, *given, **more):
            trained.append(given[3].name)

        def run(self):
            return Outcome({}, float(labels.index(trained[-1])), None)

    monkeypatch.setattr(point_run, "Trainer", Trained)
    pool, random = points["pool@1"], points["random@2"]
    for one, expected in ((runner, 2), (first, 3)):
        trained.clear()
        for point in (pool, random, pool):
            assert one.train(point, print, keep=True).step_seconds == labels.index(point.label)
        assert len(trained) == expected  # a worker reads the first one again, and has room for the second
        assert one.train(pool, print, keep=False).step_seconds == 0 and len(trained) == expected


def test_a_task_that_was_stopped_stops_the_sweep():
    with pytest.raises(Interrupted, match="saved"):
        list(ProcessExecutor(2).run([Task("a", interrupted)], print))


def test_the_rows_are_those_of_one_process(tmp_path):
    def rows(folder, executor):
        found = Sweep(
            tiny_sweep(), tmp_path / folder, config_path="c.py", console=new_console(), executor=executor
        ).run()
        return [{key: value for key, value in row.items() if key not in TIMES} for row in found]

    expected = rows("one", None)
    assert rows("two", ProcessExecutor(2)) == expected and len(expected) > 1
    kept = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in kept] == [row["label"] for row in expected]
