"""Numbered checkpoints of a run: which are kept, and what is said where the folder is gone."""

import contextlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.checkpoints.orbax import CheckpointError, RunCheckpoints

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
            with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* is damaged or of another model"):
                checkpoints.restore(1, like)
