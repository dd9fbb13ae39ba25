"""When a run of several hosts saves copies of its state on them, and resumes from one."""

import contextlib
import logging
import re
import secrets
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlm_jax.checkpoints.local_copies import LocalCopies, check_replicas
from vlm_jax.checkpoints.orbax import CHECKPOINTS, Resumed, RunCheckpoints
from vlm_jax.checkpoints.verification import DamagedCheckpoint
from vlm_jax.sharding.mesh import DATA
from vlm_jax.sharding.processes import is_primary, wait_for_all
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.workdir import write_whole
from vlm_jax.types import Fields, Tree

COPIES_ID = "copies_id"  # file of a workdir: which copies on the hosts are its

_log = logging.getLogger(__name__)


class Copies:
    """The copies of `config.loop.local_copies`; of a run without them nothing is saved or read.

    Args:
      settings: of the loop.
      mesh: devices.
      workdir: of the run.

    Raises:
      ConfigError: the mesh has no replicas with hosts of their own.
    """

    def __init__(self, settings: LoopSettings, mesh: Mesh, workdir: epath.Path):
        self._folder, self._every, self._mesh, self._workdir = settings.local_copies, settings.copy_every, mesh, workdir
        self._saved: LocalCopies | None = None
        if self._folder is not None:
            check_replicas(mesh, DATA, self._folder, "config.loop.local_copies")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Opens the copies inside the `with`; enter it before the run's checkpoints are opened."""
        if self._folder is None:
            yield
            return
        self._saved = LocalCopies(self._folder, self._run_id(), self._mesh, DATA)
        with contextlib.closing(self._saved):
            yield

    def _run_id(self) -> str:
        """The content of the file `COPIES_ID`, another one where the run has no folder of checkpoints."""
        path, found = self._workdir / COPIES_ID, ""
        if is_primary():
            found = path.read_text() if path.exists() and (self._workdir / CHECKPOINTS).exists() else ""
            if not re.fullmatch("[0-9a-f]{8}", found):
                found = secrets.token_hex(4)
                write_whole(path, found)
        value = np.asarray(int(found or "0", 16), np.uint32)
        return f"{int(multihost_utils.broadcast_one_to_all(value)):08x}"

    def is_due(self, step: int) -> bool:
        """Whether a copy is saved after a step."""
        return self._saved is not None and step % self._every == 0

    def save(self, step: int, state: Tree) -> None:
        """Saves a copy; see `LocalCopies.save`."""
        assert self._saved is not None
        self._saved.save(step, state)

    def newest(
        self, checkpoints: RunCheckpoints, like: Callable[[int], Tree], position: Callable[[int], Fields]
    ) -> Resumed | None:
        """What a run resumes from: a copy where it is newer than the checkpoint of `RunCheckpoints.newest`, else that.

        Copies that are not resumed from are deleted, since Orbax saves no copy of an earlier step than theirs.

        Args:
          checkpoints: of the run.
          like: given a step, the pytree of its state, as of `RunCheckpoints.restore`.
          position: given a step, that of the input after it.
        """
        if self._saved is None:
            return checkpoints.newest(like)
        step, found = self._saved.latest() or 0, None
        if step <= (checkpoints.latest() or 0):
            found = checkpoints.newest(like)  # an earlier one where the latest is damaged
        if step > (0 if found is None else found.step):
            found = None  # frees its memory
            try:
                state = self._saved.restore(step, like(step))
            except DamagedCheckpoint as error:
                _log.warning("%s; the run resumes from its newest checkpoint", error)
            else:
                if is_primary():
                    _log.info("resumes from the copy of step %d that other hosts have", step)
                return Resumed(step, state, position(step))
        self._saved.clear()
        return checkpoints.newest(like) if found is None else found

    def remove(self, checkpoints: RunCheckpoints) -> None:
        """Deletes the copies of a run that is finished, when its last checkpoint is complete."""
        if self._saved is not None:
            checkpoints.wait()
            wait_for_all("the last checkpoint is complete")
            self._saved.remove()
