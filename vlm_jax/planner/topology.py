"""Slices of TPUs that this machine does not have, as devices to compile for."""

import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.costs.chips import CHIPS, Chip, chip_of

# Name in a topology -> name and options of libtpu's compiler.
NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "v4": ("v4", {"chip_config_name": "megacore"}),  # two cores as one device, as in a run
    "v5e": ("v5e", {}),
    "v5p": ("v5p", {}),
    "v6e": ("v6e", {}),
    "7x": ("tpu7x", {}),
}
# Read when libtpu is loaded: this machine is not asked for its metadata, several processes may compile, and nothing is
# written to the terminal.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no effect on the slice that is compiled for
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
INSTALL = "install libtpu, the compiler of TPUs, which runs on any CPU: pip install 'vlm_jax[plan]'"


class PlanError(ValueError):
    """A plan that cannot be made; the message has the fix."""


class Topology(NamedTuple):
    """Devices of a slice.

    Attributes:
      name: as given, `v5p:4x4x4`.
      chip: what each device can do.
      devices: for `sharding.mesh.make_mesh`.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def open_topology(name: str) -> Topology:
    """The slice of a name, such as `v5p:4x4x4`; nothing but this machine's CPU is used.

    Raises:
      PlanError: libtpu is not installed, or has no such slice.
      ConfigError: the name has another form.
    """
    kind, sides = parse_topology(name)
    require_libtpu()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    compiler, options = NAMES[kind]
    shape = "x".join(map(str, sides))
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{compiler}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"--topology={name}: libtpu {libtpu_version()} has no such slice: {error}") from error
    devices = tuple(found.devices)
    chip = chip_of(devices[0].device_kind)
    assert chip is not None and len(devices) == math.prod(sides) * chip.devices_per_chip
    return Topology(name, chip, devices)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """The kind of chip and the sides of a slice's name.

    Raises:
      ConfigError: another form, or an unknown kind.
    """
    match = re.fullmatch(r"([^:]+):(\d+(?:x\d+){1,2})", name)
    if match is None:
        raise ConfigError(f"--topology: expected KIND:SIDESxSIDES, as v5e:4x4 or v5p:4x4x4, got {name!r}")
    kind, sides = match[1].removeprefix("tpu"), tuple(map(int, match[2].split("x")))
    if kind not in NAMES:
        raise ConfigError(f"--topology: unknown chip '{match[1]}'{did_you_mean(match[1], NAMES)}")
    dims = next(chip.dims for chip in CHIPS if chip.name == kind)
    if len(sides) != dims or min(sides) < 1:
        raise ConfigError(f"--topology: a slice of {kind} has {dims} sides, as {kind}:{'x'.join('4' * dims)}")
    return kind, sides


def require_libtpu() -> None:
    """Raises a PlanError that says what to install where libtpu is missing."""
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise PlanError(f"a plan needs the compiler of TPUs; {INSTALL}")


def libtpu_version() -> str:
    """The version of libtpu, by which plans differ."""
    return importlib.metadata.version("libtpu")
