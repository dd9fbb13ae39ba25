"""Numbered checkpoints of a run: which are kept, and what is said where the folder is gone."""

import contextlib
import errno
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from vlm_jax.checkpoints import orbax, runs, verification
from vlm_jax.checkpoints.checksums import array_checksums
from vlm_jax.checkpoints.hub import LazyTensor
from vlm_jax.checkpoints.orbax import RunCheckpoints
from vlm_jax.checkpoints.verification import CheckpointError

from ..advice import tried

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes that fail


def state(step):
    return {"w": jnp.full((4, 4), step, jnp.float32)}


def saved(directory, steps, keep_every=None):
    checkpoints = RunCheckpoints(directory, 2, keep_every)
    with contextlib.closing(checkpoints):
        for step in steps:
            checkpoints.save(step, state(step), {"batch": step})
        checkpoints.wait()
        return checkpoints.complete()


def test_the_newest_and_each_third_are_kept(tmp_path):
    assert saved(tmp_path / "a", range(1, 9), keep_every=3) == [3, 6, 7, 8]
    assert saved(tmp_path / "b", range(1, 9)) == [7, 8]


def test_a_folder_that_is_removed_under_a_run_is_told(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints", 2)
    checkpoints.save(4, state(4), {"batch": 4})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("so that nothing is made there")
    told = tried("failed: the folder was removed under the run; run the same command to start anew")
    with pytest.raises(CheckpointError, match=f"^saving checkpoint 5 in {tmp_path}/run/checkpoints {told}"):
        checkpoints.save(5, state(5), {"batch": 5})
        checkpoints.wait()
    (tmp_path / "run").unlink()
    assert saved(tmp_path / "run" / "checkpoints", [1]) == [1]


def test_a_state_of_another_shape_is_refused(tmp_path):
    saved(tmp_path, [1])
    checkpoints = RunCheckpoints(tmp_path, 2)
    with contextlib.closing(checkpoints):
        np.testing.assert_array_equal(checkpoints.restore(1, state(0))[0]["w"], np.full((4, 4), 1))
        for like in ({"w": jnp.zeros((4, 2))}, {"v": jnp.zeros((4, 4))}, {**state(0), "v": jnp.zeros(2)}):
            with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* is of another model: [vw]: expected "):
                checkpoints.restore(1, like)


@contextlib.contextmanager
def opened(directory):
    with contextlib.closing(RunCheckpoints(directory, 2)) as checkpoints:
        yield checkpoints


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "error", "told"),
    [
        (ocp.StandardCheckpointHandler, "restore", MemoryError("out of memory"), MemoryError),
        (verification, "check_files", OSError(errno.EMFILE, "too many open files"), CheckpointError),
    ],
)
def test_a_failure_that_proves_no_damage_is_raised_and_renames_nothing(tmp_path, monkeypatch, owner, name, error, told):
    saved(tmp_path, [1, 2])
    with opened(tmp_path) as checkpoints:
        with monkeypatch.context() as patched, pytest.raises(told) as raised:
            patched.setattr(owner, name, raising(error))
            checkpoints.newest(state)
        notes = " ".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
        assert f"checkpoint 2 in {tmp_path} cannot be read here: {type(error).__name__}: " in notes
        assert error in (raised.value, raised.value.__cause__)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert checkpoints.newest(state).step == 2
    if owner is verification:
        with (
            monkeypatch.context() as patched,
            pytest.raises(CheckpointError, match="cannot be read here: OSE"),
        ):
            patched.setattr(owner, name, raising(error))
            orbax.newest_arrays(tmp_path)


def test_each_damaged_checkpoint_is_kept_under_a_name_of_its_own(tmp_path, monkeypatch):
    saved(tmp_path, [1, 2])
    (tmp_path / "2.damaged").mkdir()
    (tmp_path / "2" / "state" / "manifest.ocdbt").unlink()
    with opened(tmp_path) as checkpoints:
        assert not checkpoints.is_whole(2) and checkpoints.is_whole(1)
        told = tried(
            "cannot be renamed ({}); fix the permissions and run the same command to resume from checkpoint {}"
        )
        with (
            monkeypatch.context() as patched,
            pytest.raises(CheckpointError, match=f"manifest.ocdbt: is missing.*{told}"),
        ):
            patched.setattr(type(epath.Path(tmp_path)), "rename", raising(PermissionError("not permitted")))
            checkpoints.newest(state)
        found = checkpoints.newest(state)
    assert found.step == 1
    np.testing.assert_array_equal(found.state["w"], np.full((4, 4), 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged", "2.damaged.1"]
    assert not any((tmp_path / "2.damaged").iterdir()) and (tmp_path / "2.damaged.1" / "state").exists()


def test_an_array_is_read_once_to_compare_it(tmp_path):
    values, reads = np.arange(12, dtype=np.float32).reshape(6, 2), []

    def read(index):
        reads.append(index)
        return values[index]

    tensor = LazyTensor(values.shape, values.dtype, read)
    compared = runs._compared(tensor, "x", epath.Path(tmp_path), array_checksums({"x": values}))
    rows = slice(1, 3), slice(0, 2)
    np.testing.assert_array_equal(compared[rows], values[1:3])
    np.testing.assert_array_equal(compared[rows], values[1:3])
    assert reads == [..., rows, rows]
