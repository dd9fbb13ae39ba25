"""Copies on hosts, without several processes; tests/faults/test_lost_host.py has them, and Orbax's manager."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vlm_jax.checkpoints import local_copies
from vlm_jax.checkpoints.checksums import HostSum
from vlm_jax.checkpoints.local_copies import LocalCopies
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.config import ConfigError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.copies import Copies
from vlm_jax.train.settings import LoopSettings

from ..advice import tried


@pytest.mark.parametrize(
    ("data", "processes", "folder", "told"),
    [
        (4, 1, "/a", tried("in a run of one process no other host has a copy; remove the key")),
        (1, 2, "/a", tried("with which each host has a part of the state that no other one has; remove the key")),
        (
            4,
            2,
            "/a",
            tried("some with devices of several replicas; set config.mesh.{} to {} or a divisor above 1, or"),
        ),
        (2, 2, "gs://a/b", tried("expected a folder of each host's own disk, got {}; pass one, as '/dev/shm/copies'")),
    ],
)
def test_runs_without_replicas_on_hosts_of_their_own_are_refused_at_the_start(
    monkeypatch, data, processes, folder, told
):
    """All devices of a test are of one process."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    mesh = make_mesh(MeshSettings(data=data, fsdp=8 // data))

    def copies(folder):
        return Copies(LoopSettings(local_copies=folder), mesh, epath.Path("run"))

    with pytest.raises(ConfigError, match=f"^config.loop.local_copies: .*{told}"):
        copies(folder)
    copies(None)
    monkeypatch.setattr(local_copies.multislice, "process_spans_multiple_replicas", lambda *_, **__: False)
    if processes == data:
        copies("/dev/shm/copies")


class Manager:
    """Stands for Orbax's: a folder a step, and what the disk does."""

    fails: Exception | None = None

    def __init__(self, folder, unused, mesh, like, *, options):
        self.folder = folder

    def latest_step(self):
        return max((int(path.name) for path in self.folder.iterdir()), default=None)

    def save(self, step, args):
        if self.fails:
            raise self.fails
        (self.folder / str(step)).mkdir()

    restore = save

    def close(self):
        pass


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens the copies of a host."""
    monkeypatch.setattr(local_copies.emergency, "CheckpointManager", Manager)
    monkeypatch.setattr(local_copies, "_index_on_host", lambda: 0)
    monkeypatch.setattr(local_copies.multihost, "initialize_distributed_to_device_ids", lambda: None)
    return lambda: LocalCopies(str(tmp_path), "run", make_mesh(MeshSettings(data=8)), "data")


def test_a_copy_that_cannot_be_written_or_read_ends_the_run_with_what_helps(opened, monkeypatch):
    state, copies = {"a": jnp.zeros(2)}, opened()
    monkeypatch.setattr(Manager, "fails", OSError(errno.ENOSPC, "No space left on device"))
    told = tried("free space there, or set config.loop.local_copies to another folder, and rerun the same command to")
    with pytest.raises(CheckpointError, match=f"saving a copy of step 4 in .*/run/1-8x1x1x1x1/0/copies.*; {told}"):
        copies.save(4, state)
    monkeypatch.setattr(Manager, "fails", None)
    copies = opened()
    assert copies.latest() is None
    copies.save(4, state)
    assert opened().latest() == 4
    monkeypatch.setattr(Manager, "restore", lambda self, step: self.save(step, None))
    monkeypatch.setattr(Manager, "fails", RuntimeError("Gloo all-reduce failed: Connection closed by peer"))
    told = tried(
        "rerun the same command on all hosts to read it again, or delete {} first to resume from another copy or"
    )
    with pytest.raises(CheckpointError, match=rf"\(RuntimeError: Gloo .* peer\), and was left as it is; {told}"):
        copies.restore(4, state)
    copies = opened()
    assert copies.latest() == 4
    monkeypatch.setattr(Manager, "fails", ValueError("Error decoding manifest"))
    told = tried("and was deleted; rerun the same command on all hosts to resume from another copy or checkpoint")
    with pytest.raises(CheckpointError, match=rf"cannot be read \(ValueError: Error decoding manifest\), {told}"):
        copies.restore(4, state)
    assert opened().latest() is None


def test_a_copy_whose_write_fails_at_the_end_of_a_run_is_told(opened, monkeypatch, caplog):
    def close(manager):
        raise OSError(errno.ENOSPC, "No space left on device")

    copies = opened()
    monkeypatch.setattr(Manager, "close", close)
    copies.close()
    (line,) = caplog.messages
    assert "/run/1-8x1x1x1x1/0/copies was not written (OSError: [Errno 28] No space left on device)" in line


def test_merged_checksums_are_those_of_values_with_one_zero_and_one_nan():
    mesh = make_mesh(MeshSettings(data=8))
    normal = np.float32([0.0, 0.0, 0.0, 1.2e-38, -2.5, np.inf, -np.inf, 3.4e38])
    other = normal.copy()
    other[:3] = -0.0, 1e-40, -1e-45
    nans = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    cases = [normal, other, -normal, np.full(3, nans[0]), nans, np.int32([-(2**31), 0, 5])]
    cases += [x.astype("bfloat16") for x in (normal, other)]
    sums = np.asarray(local_copies.merged_checksums([jnp.asarray(x) for x in cases], mesh)).tolist()
    alone = [HostSum().add(x).value for x in cases]
    assert sums[0] == sums[1] == alone[0] != alone[1] and sums[2] != sums[0]
    assert sums[3] == sums[4] == alone[3] != alone[4] and sums[5] == alone[5]
    assert sums[6] == sums[7] == alone[6] != alone[7]
