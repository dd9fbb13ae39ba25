"""The device mesh of a run: five named axes, sized by the config."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError

DATA, FSDP, TENSOR, CONTEXT, EXPERT = "data", "fsdp", "tensor", "context", "expert"


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; their product is the number of devices, -1 takes what is left.

    Attributes:
      data: whole copies of the model, each with a share of the batch.
      fsdp: shares of the batch and of every large parameter.
      tensor: shares of heads, hidden widths and vocabulary.
      context: shares of the sequence.
      expert: shares of the experts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1


def make_mesh(settings: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out.

    Args:
      settings: the size of every axis.
      devices: all of the process group's when None.

    Raises:
      ConfigError: more than one -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh: sizes are positive, and one at most is -1; got {sizes}")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"config.mesh: {sizes} does not multiply to the {len(devices)} devices that there are")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)
