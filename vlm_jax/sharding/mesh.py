"""The device mesh of a run: five named axes, sized by the config."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError

DATA, FSDP, TENSOR, CONTEXT, EXPERT = "data", "fsdp", "tensor", "context", "expert"


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; their product is the number of devices, -1 takes the remaining ones.

    Attributes:
      data: copies of the model, each with a part of the batch.
      fsdp: shards of the batch and of every large parameter.
      tensor: shards of heads, hidden widths and vocabulary.
      context: shards of the sequence.
      expert: shards of the experts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1


def make_mesh(settings: MeshSettings, devices: Sequence[object] | None = None) -> Mesh:
    """Creates the mesh.

    Args:
      settings: the size of every axis.
      devices: devices of the mesh; all of the process group when None.

    Raises:
      ConfigError: more than one -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh: expected positive sizes, at most one of them -1, got {sizes}")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"config.mesh: the product of {sizes} is not the number of devices, {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)
