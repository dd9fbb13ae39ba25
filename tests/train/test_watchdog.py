"""Which process of a run counts as lost, and what is said of it."""

import json

import jax
import pytest
from etils import epath

from vlm_jax.train import watchdog
from vlm_jax.train.watchdog import Beat, Judge, Watchdog
from vlm_jax.train.workdir import WorkdirError

from ..advice import tried


class Run:
    """Beats of three processes, looked at once a second by the second one, which loses another after five seconds."""

    def __init__(self, mine=1):
        self.beats = {index: Beat(index, f"place {index}", step=7, is_stepping=True) for index in range(3)}
        self.judge, self.mine, self.now = Judge(mine, 5.0), mine, 100.0

    def change(self, index, **values):
        self.beats[index] = Beat(**{**vars(self.beats[index]), **values})

    def after(self, seconds, silent=()):
        """The verdict after so many looks; processes that are not silent beat before each."""
        for _ in range(seconds):
            self.now += 1
            for index in set(self.beats) - set(silent):
                self.change(index, count=self.beats[index].count + 1)
            said = self.judge.verdict(self.beats, self.beats[self.mine], self.now)
        return said


def test_a_process_without_beats_is_named_with_its_step_after_the_limit():
    run = Run()
    assert run.after(60) is None
    assert run.after(4, silent=[2]) is None
    assert run.after(1) is None  # it was only slow
    assert run.after(4, silent=[2]) is None
    assert run.after(1, silent=[2]) == (
        "process 2 (place 2) has given no sign of life for 5 seconds, and was at step 7 then"
    )
    assert run.after(1) is None
    assert run.after(9, silent=[1]) is None  # itself


def test_a_process_that_beats_and_takes_no_step_is_named():
    run = Run()
    run.change(0, step=8)
    run.change(1, step=8)
    assert run.after(5) is None  # from the first look on
    assert run.after(1) == "process 2 (place 2) has been at step 7 for 5 seconds, while others are at step 8"
    run.change(2, step=8)
    assert run.after(20) is None  # all wait for the same step: none of them is to blame
    run.change(1, step=9)
    run.change(0, is_stepping=False)
    run.change(2, is_stepping=False)
    assert run.after(20) is None  # a compilation, or a checkpoint


def test_a_process_that_ended_with_an_error_is_named_with_it_and_one_that_finished_is_not():
    run = Run()
    run.change(0, ended="")
    run.change(2, ended="MalformedRecords: a.json:3")
    assert run.after(5, silent=[0, 2]) is None
    assert run.after(1, silent=[0, 2]) == "process 2 (place 2) ended at step 7: MalformedRecords: a.json:3"


def test_all_lost_processes_are_named_but_only_the_first_where_it_is_lost_since_the_others_are_seen_through_it():
    run = Run()
    run.beats[3] = Beat(3, "place 3", step=6)
    run.after(1)
    assert run.after(6, silent=[2, 3]) == (
        "process 2 (place 2) has given no sign of life for 6 seconds, and was at step 7 then; "
        "process 3 (place 3) has given no sign of life for 6 seconds, and was at step 6 then"
    )
    assert run.after(6, silent=[0, 2, 3]) == (
        "process 0 (place 0) has given no sign of life for 6 seconds, and was at step 7 then"
    )


def test_a_look_after_a_pause_of_its_own_begins_anew():
    run = Run()
    run.after(4, silent=[2])
    run.judge.forget()
    assert run.after(5, silent=[2]) is None
    assert run.after(1, silent=[2]) is not None


def test_a_process_that_takes_steps_has_lost_nobody():
    run = Run()
    for step in range(8, 20):
        run.change(0, step=step)
        run.change(1, step=step)  # 2 cannot reach the store, and steps with the others
        assert run.after(1, silent=[2]) is None
    assert run.after(4, silent=[2]) is None
    assert run.after(1, silent=[2]).startswith("process 2 (place 2) has given no sign of life for 16 seconds")


def test_a_process_that_is_long_at_what_may_take_any_time_is_told_of_once_in_every_limit():
    run, said = Run(), []
    run.change(0, step=9)
    run.change(2, is_stepping=False)
    for now in range(12):
        said.append(run.judge.warnings(run.beats, run.beats[1], float(now)))
    told = {now: lines for now, lines in enumerate(said) if lines}
    assert sorted(told) == [5, 10]
    assert told[10] == [
        "process 2 (place 2) is not stepping since step 7 for 10 seconds (it compiles, saves, reads or evaluates), "
        "while others are at step 9"
    ]


def test_processes_that_do_not_see_the_same_workdir_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(watchdog, "wait_for_all", lambda name: None)
    monkeypatch.setattr(watchdog, "any_process", lambda flag: flag)
    told = tried(
        "heartbeat is not in {}, which all hosts must see; pass the same --workdir on all of them, in a shared"
    )
    of_first = Watchdog(epath.Path(tmp_path), 5.0)
    with pytest.raises(WorkdirError, match=f"^process 1's {told}"), of_first.held():
        pass
    (tmp_path / "heartbeats" / "1.json").write_text(json.dumps(vars(Beat(1, "there"))))
    with of_first.held():
        board = json.loads((tmp_path / "heartbeats" / "all.json").read_text())
    assert [beat["process"] for beat in board["beats"]] == [0, 1]
