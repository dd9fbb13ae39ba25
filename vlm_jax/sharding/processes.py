"""Coordination of the processes of one run."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.types import Tree


def is_primary() -> bool:
    """Whether this process writes the run's files; all processes read them."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must call this at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of every process's array of one shape; every process must call this at the same step."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values)).sum(axis=0)


def to_host(array: Tree) -> np.ndarray:
    """The whole of a global array, on every host."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(name: str) -> None:
    """A barrier: returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
