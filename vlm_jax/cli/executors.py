"""Flags of where the points of a sweep or an evaluation are run."""

import contextlib
from collections.abc import Iterator

import jax
from absl import flags

from vlm_jax.cli import numbers
from vlm_jax.config import ConfigError
from vlm_jax.ranges import Count
from vlm_jax.sweep.executor import Executor, LocalExecutor
from vlm_jax.sweep.on_processes import ProcessExecutor
from vlm_jax.sweep.on_ray import RaySettings, ray_executor

EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "ray"], "Where points are run: in this process, or on a Ray cluster (extra ray)."
)
PROCESSES = numbers.define(
    "processes", Count, 1, "With --executor=local, processes that divide the CPUs and run a point each."
)
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address", None, "With --executor=ray, HOST:PORT of a cluster, or auto; a new one on this host if unset."
)
CHIPS_PER_POINT = numbers.define(
    "chips_per_point", Count, None, "With --executor=ray, TPU chips or GPUs of a point; all of a host if unset."
)
CPUS_PER_POINT = numbers.define(
    "cpus_per_point", Count, None, "With --executor=ray, CPUs of a point; its chips' part of a host, or all, if unset."
)


@contextlib.contextmanager
def open_executor() -> Iterator[Executor]:
    """The executor of the flags, inside the `with`.

    Raises:
      ConfigError: a flag of Ray without it, or as `ray_executor`.
    """
    settings = RaySettings(RAY_ADDRESS.value, CHIPS_PER_POINT.value, CPUS_PER_POINT.value)
    is_apart = EXECUTOR.value == "ray" or PROCESSES.value != 1
    if is_apart and jax.distributed.is_initialized():
        raise ConfigError("--executor=ray, --processes: a point is one process; omit --distributed")
    if EXECUTOR.value == "ray":
        if PROCESSES.value != 1:
            raise ConfigError("--processes: only with --executor=local; omit the flag")
        with ray_executor(settings) as executor:
            yield executor
        return
    for flag in (RAY_ADDRESS, CHIPS_PER_POINT, CPUS_PER_POINT):
        if flag.value is not None:
            raise ConfigError(f"--{flag.name}: only with --executor=ray; add it, or omit the flag")
    if PROCESSES.value == 1:
        yield LocalExecutor()
        return
    yield ProcessExecutor(PROCESSES.value)
