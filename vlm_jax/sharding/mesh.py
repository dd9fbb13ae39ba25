"""The device mesh of a run: five named axes, sized by the config."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError, check_fields
from vlm_jax.ranges import INT32, Range

DATA, FSDP, TENSOR, CONTEXT, EXPERT = "data", "fsdp", "tensor", "context", "expert"
Devices = Annotated[int, Range(1, INT32, also=-1)]


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; their product is the number of devices, -1 takes the remaining ones.

    Attributes:
      data: copies of the model, each with a part of the batch.
      fsdp: shards of the batch and of every large parameter.
      tensor: shards of heads, hidden widths and vocabulary.
      context: shards of the sequence, by ring attention.
      expert: shards of the experts.
    """

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1
    context: Devices = 1
    expert: Devices = 1

    def __post_init__(self):
        check_fields(self, "config.mesh.")


def make_mesh(settings: MeshSettings, devices: Sequence[object] | None = None) -> Mesh:
    """Creates the mesh.

    Args:
      settings: the size of every axis.
      devices: devices of the mesh; all of the process group when None.

    Raises:
      ConfigError: more than one -1, a product that is not the number of devices, or devices of several slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ConfigError(f"config.mesh: expected at most one -1, got {sizes}")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"config.mesh: the product of {sizes} is not the number of devices, {len(devices)}")
    if len(slices := {getattr(device, "slice_index", 0) for device in devices}) > 1:
        raise ConfigError(f"config.mesh: expected the devices of one slice, got those of {len(slices)}")
    # An axis may be a part of a torus dimension, such as 2 of 4 chips in a row; jax.make_mesh refuses it on most TPUs.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), (AxisType.Auto,) * len(sizes))
