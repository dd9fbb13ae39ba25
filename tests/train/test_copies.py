"""What a run of several hosts resumes from, by stand-ins for its copies and checkpoints."""

import pytest
from etils import epath

from vlm_jax.checkpoints.local_copies import LocalCopies
from vlm_jax.checkpoints.orbax import Resumed, RunCheckpoints
from vlm_jax.checkpoints.verification import CheckpointError, DamagedCheckpoint
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train import copies
from vlm_jax.train.copies import Copies
from vlm_jax.train.settings import LoopSettings

WHOLE, DAMAGED, UNREAD = "whole", "damaged", "unread"


class Hosts(LocalCopies):
    """Copies on hosts, of one step or none."""

    def __init__(self, step, is_damaged=False):
        self.step, self.is_damaged, self.asked = step, is_damaged, []

    def latest(self):
        return self.step

    def restore(self, step, like):
        self.asked.append((step, like))
        if self.is_damaged:
            self.clear()
            raise DamagedCheckpoint(f"the copy of step {step} is damaged")
        return f"copy {step}"

    def clear(self):
        self.step = None

    def close(self):
        pass


class Checkpoints(RunCheckpoints):
    """Checkpoints with the state of each; as `RunCheckpoints`, `newest` reads the newest that is not damaged."""

    def __init__(self, states):
        self.states = states

    def latest(self):
        return max(self.states, default=None)

    def newest(self, like):
        for step, state in sorted(self.states.items(), reverse=True):
            if state == UNREAD:
                raise CheckpointError("cannot be read here")
            if state == WHOLE:
                self.states = {one: state for one, state in self.states.items() if one <= step}  # others are set aside
                return Resumed(step, f"checkpoint {step}", {"batch": step})
        return None


@pytest.fixture
def newest(monkeypatch, tmp_path):
    """`Copies.newest` of given copies and checkpoints."""
    mesh = make_mesh(MeshSettings(data=8))
    monkeypatch.setattr(copies, "check_replicas", lambda *_: None)

    def of(hosts, checkpoints):
        monkeypatch.setattr(copies, "LocalCopies", lambda *_: hosts)
        run = Copies(LoopSettings(local_copies="/copies"), mesh, epath.Path(tmp_path))
        with run.held():
            return run.newest(Checkpoints(checkpoints), lambda step: f"like {step}", lambda step: {"batch": step - 1})

    return of


@pytest.mark.parametrize(
    ("copy", "checkpoints", "expected"),
    [
        (None, {}, None),
        (None, {4: WHOLE}, "checkpoint 4"),
        (6, {}, "copy 6"),
        (6, {4: WHOLE}, "copy 6"),
        (6, {4: DAMAGED}, "copy 6"),
        (6, {6: WHOLE}, "checkpoint 6"),
        (6, {4: WHOLE, 8: WHOLE}, "checkpoint 8"),
        (6, {4: WHOLE, 8: DAMAGED}, "copy 6"),
        (2, {4: WHOLE, 8: DAMAGED}, "checkpoint 4"),
    ],
)
def test_the_newest_state_that_can_be_read_is_resumed_from_and_other_copies_are_deleted(
    newest, copy, checkpoints, expected
):
    hosts = Hosts(copy)
    found = newest(hosts, checkpoints)
    if expected is None:
        assert found is None
    else:
        kind, step = expected.split()
        assert found == Resumed(int(step), expected, {"batch": int(step) - (kind == "copy")})
    is_copy = expected == f"copy {copy}"
    assert hosts.asked == ([(copy, f"like {copy}")] if is_copy else [])
    assert hosts.step == (copy if is_copy else None)


@pytest.mark.parametrize(("checkpoints", "step"), [({4: WHOLE}, 4), ({4: WHOLE, 8: DAMAGED}, 4), ({}, None)])
def test_a_damaged_copy_is_told_and_not_resumed_from(newest, checkpoints, step, caplog):
    hosts = Hosts(6, is_damaged=True)
    found = newest(hosts, checkpoints)
    assert (None if found is None else found.step) == step and hosts.step is None
    assert "the copy of step 6 is damaged; the run resumes from its newest checkpoint" in caplog.text


def test_copies_stay_where_a_checkpoint_cannot_be_read(newest):
    hosts = Hosts(6)
    with pytest.raises(CheckpointError, match="cannot be read here"):
        newest(hosts, {8: UNREAD})
    assert hosts.step == 6 and not hosts.asked
