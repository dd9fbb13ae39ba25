"""The executor of this process, the lock of a point, and what of a point goes to another process."""

import dataclasses
import pickle

import pytest
from etils import epath

from vlm_jax.build import build_conversational
from vlm_jax.sweep.executor import Ended, LocalExecutor, Stopped, Task, exclusive
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.point_run import PointRunner
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.progress import PointsProgress
from vlm_jax.sweep.rows import run_points
from vlm_jax.train.claim import Claim
from vlm_jax.train.lock import WorkdirInUse
from vlm_jax.train.loop import Interrupted
from vlm_jax.train.workdir import read_lines

from .test_run import new_console, tiny_sweep


def task(label, value):
    def call(report):
        report(label, 1, "note")
        if isinstance(value, BaseException):
            raise value
        return value

    return Task(label, call)


def test_tasks_run_in_their_order_and_an_error_ends_only_its_own():
    told, error = [], ValueError("no")
    every = LocalExecutor().run([task("a", 1), task("b", error), task("c", 3)], lambda *said: told.append(said))
    assert next(every) == Ended("a", 1) and told == [("a", 1, "note")]  # nothing is run ahead
    assert list(every) == [Ended("b", error=error), Ended("c", 3)]


def test_processes_of_one_run_stop_a_point_together_and_go_on(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    error = Stopped("at step 2")
    ended = list(LocalExecutor().run([task("a", error), task("b", 1)], print))
    assert ended == [Ended("a", error=error), Ended("b", 1)]
    with pytest.raises(ValueError, match="no"):
        list(LocalExecutor().run([task("a", ValueError("no"))], print))


@pytest.mark.parametrize("error", [Interrupted("saved"), KeyboardInterrupt()])
def test_what_stops_the_process_passes_through(error):
    with pytest.raises(type(error)):
        list(LocalExecutor().run([task("a", error)], print))


def test_a_point_is_run_by_one_process_at_a_time(tmp_path):
    folder = epath.Path(tmp_path) / "points" / "a"
    with exclusive(folder), pytest.raises(WorkdirInUse, match="is in use by process"), exclusive(folder, 0.0):
        pass
    with exclusive(folder, 0.0):
        assert (folder / "point.lock").exists()
        (folder / "answers.jsonl").write_text("")
    assert [path.name for path in folder.iterdir()] == ["answers.jsonl"]
    with exclusive(folder.parent / "b"):
        pass
    assert not (folder.parent / "b").exists()  # nothing was written


class Held(Claim):
    """A claim that another process takes before a write."""

    def __init__(self, workdir, writes):
        self.workdir, self._left = workdir, writes

    def confirm(self):
        self._left -= 1
        if self._left < 0:
            raise WorkdirInUse("taken over")


def rows_of(tmp_path, tasks, todo, rows, writes=9):
    workdir = epath.Path(tmp_path)
    failures, progress = Failures(workdir, new_console()), PointsProgress(new_console(), "steps", 1, len(todo))
    run_points(LocalExecutor(), tasks, todo, rows, failures, Held(workdir, writes), progress)
    return failures.errors


def test_rows_are_kept_in_the_order_of_the_points_and_errors_are_named(tmp_path):
    tasks = [task("shared", None), task("c", {"label": "c"}), task("b", ValueError("no")), task("a", {"label": "a"})]
    rows = {"old": {"label": "old"}}
    assert rows_of(tmp_path, tasks, ["a", "b", "c"], rows) == {"b": "ValueError: no"}
    assert [line["label"] for line in read_lines(epath.Path(tmp_path) / "results.jsonl")] == ["old", "a", "c"]
    assert read_lines(epath.Path(tmp_path) / "failed.jsonl") == [{"label": "b", "error": "ValueError: no"}]


def test_a_point_that_was_stopped_has_no_row_and_has_not_failed(tmp_path):
    tasks = [task("a", Stopped("at step 2 with a loss of 3")), task("b", {"label": "b"})]
    workdir = epath.Path(tmp_path)
    failures, progress = Failures(workdir, new_console()), PointsProgress(new_console(), "steps", 1, 2)
    rows = {}
    run_points(LocalExecutor(), tasks, ["a", "b"], rows, failures, Held(workdir, 9), progress)
    assert list(rows) == ["b"] and failures.errors == {} and progress.line().startswith("2/2 points")
    stopped = [{"label": "a", "stopped": "at step 2 with a loss of 3"}]
    assert read_lines(workdir / "stopped.jsonl") == stopped
    Failures(workdir, new_console())  # the next call begins anew
    assert read_lines(workdir / "stopped.jsonl") == []


def test_without_what_points_share_no_point_is_run(tmp_path):
    with pytest.raises(ValueError, match="no"):
        rows_of(tmp_path, [task("shared", ValueError("no")), task("a", {"label": "a"})], ["a"], {})
    assert not (tmp_path / "results.jsonl").exists()


def test_a_process_that_lost_the_workdir_writes_no_row_over_those_of_the_other(tmp_path):
    with pytest.raises(WorkdirInUse, match="taken over"):
        rows_of(tmp_path, [task("a", {"label": "a"}), task("b", {"label": "b"})], ["a", "b"], {}, writes=1)
    assert [line["label"] for line in read_lines(epath.Path(tmp_path) / "results.jsonl")] == ["a"]


def test_a_point_is_the_same_in_another_process(tmp_path):
    config = tiny_sweep()
    with config.unlocked():
        connector = {"kind": "matryoshka", "budgets": (1, 2, 4), "inner": {"kind": "pool"}}
        config.candidates.update({"nested": {"budgets": (1,), "trained_at": 4, "connector": connector}})
    for point in list_points(config):
        runner, same = pickle.loads(pickle.dumps((PointRunner(config.base, ("seeing",), tmp_path), point)))
        for name in [field.name for field in dataclasses.fields(point) if field.name not in ("experiment", "training")]:
            assert getattr(same, name) == getattr(point, name), name
        assert same.experiment.boxed_shapes() == build_conversational(point.config).boxed_shapes()
        assert same.training[0] == point.training[0]
        assert same.training[1].system.budget == point.training[1].system.budget
        assert (same.training[1] is same.experiment) == (point.label != "nested@1")
        assert runner.folder(point.label) == epath.Path(tmp_path) / "points" / point.label
