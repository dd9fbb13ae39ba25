"""Copies of a run's state on the disks of its own hosts, by Orbax's emergency manager.

Every replica of the model along one axis of the mesh has hosts of its own. Each host of the replicas but the first also
keeps its part of the state in a folder of its own disk or memory, which can be written more often than the shared
folder of the checkpoints. Where the run starts again after a host was lost, a replica whose hosts all have the newest
copy reads it, and its values pass to the others over the network between the devices.

Of a replica with several hosts each has only its part, so they must have the process indices of before. Where they have
not, or a value is not as it was, the checksums tell.

Source: `orbax.checkpoint.experimental.emergency.checkpoint_manager` of orbax-checkpoint 0.12. Deviation: the run's own
checkpoints take the place of its persistent ones, since they have checksums, the place in the data, and fall back.
"""

import logging
import shutil
import socket
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint._src.multihost import multihost, multislice
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

from vlm_jax.checkpoints.checksums import merged_checksums
from vlm_jax.checkpoints.verification import (
    CheckpointError,
    DamagedCheckpoint,
    damage_of,
    failed_anywhere,
    few,
    first_line,
    named,
)
from vlm_jax.config import ConfigError
from vlm_jax.paths import absolute, is_remote
from vlm_jax.types import Tree

STATE, SUMS = "state", "checksums"  # keys of what is saved

_log = logging.getLogger(__name__)


def check_replicas(mesh: Mesh, axis: str, folder: str, path: str) -> None:
    """Checks that each replica of the model has hosts of its own, and that the folder is local.

    Args:
      mesh: of the run.
      axis: along which the model is copied.
      folder: for the copies.
      path: of the config key, for the error.

    Raises:
      ConfigError: there is one process or one replica, a process has devices of several, or the folder is in a bucket.
    """
    replicas, processes = mesh.shape[axis], jax.process_count()
    if is_remote(folder):
        raise ConfigError(
            f"{path}: expected a folder of each host's own disk, got {folder}; pass one, as '/dev/shm/copies'"
        )
    if processes == 1:
        raise ConfigError(f"{path}: in a run of one process no other host has a copy; remove the key")
    if replicas == 1:
        raise ConfigError(
            f"{path}: expected config.mesh.{axis} above 1, got 1, with which each host has a part of the state that no "
            "other one has; remove the key"
        )
    if multislice.process_spans_multiple_replicas(mesh, replica_axis_index=mesh.axis_names.index(axis)):
        raise ConfigError(
            f"{path}: expected replicas with hosts of their own, got config.mesh.{axis}={replicas} over {processes} "
            f"processes, some with devices of several replicas; set config.mesh.{axis} to {processes} or a divisor "
            "above 1, or remove the key"
        )


class _Never(managers.SaveDecisionPolicy):
    """Saves nothing. Not `should_save_fn`, beside which Orbax saves at a preemption."""

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        return False


class LocalCopies:
    """The copies of one run; all processes call every method alike.

    Args:
      folder: on each host's own disk, created if missing; the processes of one host have a folder each in it.
      run: an identifier of the run, whose copies alone are read.
      mesh: of the run; see `check_replicas`.
      axis: along which the model is copied.
    """

    def __init__(self, folder: str, run: str, mesh: Mesh, axis: str):
        self._mesh, self._axis = mesh, axis
        # Copies of another mesh are not read, since a host would have another part.
        shape = "x".join(map(str, mesh.devices.shape))
        self._own = epath.Path(absolute(folder)) / run / f"{jax.process_count()}-{shape}" / str(_index_on_host())
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Orbax reads its own flags; they keep their defaults
        multihost.initialize_distributed_to_device_ids()
        self._make()

    def _make(self) -> None:
        for made in (self._copies, self._unused):
            made.mkdir(parents=True, exist_ok=True)
        self._manager: Any = self._open(None)

    @property
    def _copies(self) -> epath.Path:
        return self._own / "copies"

    @property
    def _unused(self) -> epath.Path:
        """Where Orbax would save persistently; it has to exist."""
        return self._own / "unused"

    def _open(self, like: Tree) -> Any:
        options = emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
            persistent=emergency.PersistentCheckpointOptions(save_decision_policy=_Never()),
            replica_axis_index=self._mesh.axis_names.index(self._axis),
        )
        return emergency.CheckpointManager(self._copies, self._unused, self._mesh, like, options=options)

    def latest(self) -> int | None:
        """The newest step of which all hosts of a replica have a copy, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree) -> None:
        """Starts to save a copy; returns when the arrays are on the hosts.

        Args:
          step: of the run.
          state: a pytree of arrays on the mesh.

        Raises:
          CheckpointError: this copy or the one before it cannot be written, here or on another host.
        """
        try:
            saved = {STATE: state, SUMS: merged_checksums(jax.tree.leaves(state), self._mesh)}
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(saved)))
        except Exception as error:
            raise CheckpointError(
                f"saving a copy of step {step} in {self._copies} failed: {first_line(error)}; free space there, or set "
                "config.loop.local_copies to another folder, and rerun the same command to resume"
            ) from error

    def restore(self, step: int, like: Tree) -> Tree:
        """Reads a copy, on the hosts of one replica, for all.

        Args:
          step: of the copy.
          like: a pytree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The state; by Orbax's sum with zeros, zeros have no sign, and on some devices too small values are zero.

        Raises:
          DamagedCheckpoint: a value is not as it was written; the copies are deleted.
          CheckpointError: the copy of this host cannot be read; it is deleted where its files are damaged, and else
            left, since the cause may be another host that is lost.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec())
        count = len(jax.tree.leaves(like))
        wanted = {STATE: like, SUMS: jax.ShapeDtypeStruct((count,), np.uint32, sharding=sharding)}
        self.close()
        self._manager = self._open(wanted)
        try:
            found = self._manager.restore(step)[STATE]
        except Exception as error:  # of this host's copy, or of the values from another host
            if damage_of(error) is None:
                raise CheckpointError(
                    f"the copy of step {step} cannot be read here ({first_line(error)}), and was left as it is; rerun "
                    f"the same command on all hosts to read it again, or delete {self._copies} first to resume from "
                    "another copy or checkpoint"
                ) from error
            shutil.rmtree(self._copies, ignore_errors=True)
            raise CheckpointError(
                f"the copy of step {step} in {self._copies} cannot be read ({first_line(error)}), and was deleted; "
                "rerun the same command on all hosts to resume from another copy or checkpoint"
            ) from error
        state, expected = found[STATE], np.asarray(found[SUMS])
        sums = np.asarray(merged_checksums(jax.tree.leaves(state), self._mesh))
        lines = [
            f"{name}: expected {one:08x}, found {other:08x}"
            for name, one, other in zip(named(state), expected, sums, strict=True)
            if one != other
        ]
        if failed_anywhere(bool(lines)):
            self.clear()
            raise DamagedCheckpoint(f"the copy of step {step} on the hosts is damaged and was deleted: {few(lines)}")
        return state

    def close(self) -> None:
        """Waits for the copy that is being saved, and warns where that fails; the first call of several."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:  # Orbax raises what the background thread did
                _log.warning("the last copy in %s was not written (%s)", self._copies, first_line(error))

    def clear(self) -> None:
        """Deletes the copies of all processes, after which others can be saved."""
        if failed_anywhere(any(self._copies.iterdir())):
            self.remove()
            self._make()

    def remove(self) -> None:
        """Closes, and deletes this process's copies."""
        self.close()
        shutil.rmtree(self._own, ignore_errors=True)


def _index_on_host() -> int:
    """The index of this process among those of its host."""
    host = np.asarray(zlib.crc32(socket.gethostname().encode()), np.uint32)
    hosts = multihost_utils.process_allgather(host)
    return int(np.sum(hosts[: jax.process_index()] == host))
