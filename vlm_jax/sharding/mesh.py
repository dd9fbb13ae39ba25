"""The device mesh of a run: five named axes, sized by the config."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError, check_fields, parse
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


def make_mesh(settings: MeshSettings, devices: Sequence[object] | None = None, *, path: str = "config.mesh") -> Mesh:
    """Creates the mesh.

    Args:
      settings: the size of every axis.
      devices: devices of the mesh; all of the process group when None.
      path: of the settings, for errors.

    Raises:
      ConfigError: more than one -1, a product that is not the number of devices, or copies of the model that do not
        divide over several slices (of TPUs, or of GPUs that NVLink joins).
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ConfigError(f"{path}: expected at most one -1, got {sizes}")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"{path}: the product of {sizes} is not the number of devices, {len(devices)}")
    # An axis may be a part of a torus dimension, such as 2 of 4 chips in a row; jax.make_mesh refuses it on most TPUs.
    given = {"devices": devices, "allow_split_physical_axes": True}
    count = len({getattr(device, "slice_index", 0) for device in devices})
    if count == 1:
        placed = mesh_utils.create_device_mesh(tuple(sizes.values()), **given)
    elif sizes["data"] % count:
        raise ConfigError(
            f"{path}.data: between {count} slices only copies of the model fit, got {sizes['data']}; set it to "
            f"{count}, or to a multiple of it"
        )
    else:
        inner = {**sizes, "data": sizes["data"] // count}
        over = tuple(count if axis == "data" else 1 for axis in sizes)
        placed = mesh_utils.create_hybrid_device_mesh(tuple(inner.values()), over, **given)
    return Mesh(placed, tuple(sizes), (AxisType.Auto,) * len(sizes))


def parse_generation_mesh(text: str, path: str) -> MeshSettings:
    """The mesh that a command, or an argument of a harness, names for answering with one model; asks for no device.

    Args:
      text: axes with their devices, such as `tensor:4,data:2`; `+` separates as `,` does, for a harness whose arguments
        commas separate. `data`, if not named, takes the remaining devices, or is 1 if another axis is -1.
      path: where the text is from, for errors.

    Raises:
      ConfigError: text of another form, or an axis that does not exist or that generation does not shard.
    """
    sizes: dict[str, int] = {}
    for word in text.replace("+", ",").split(","):
        name, _, size = word.strip().partition(":")
        if not re.fullmatch(r"-?\d+", size) or name in sizes:
            raise ConfigError(f"{path}: expected axes with their devices, once each, as tensor:4,data:2, got '{text}'")
        sizes[name] = int(size)
    if sizes.get(CONTEXT, 1) != 1:
        raise ConfigError(f"{path}: generation does not shard the sequence; leave {CONTEXT} out, got '{text}'")
    if -1 in sizes.values():
        sizes.setdefault(DATA, 1)
    return parse(MeshSettings, sizes, path)


def make_generation_mesh(text: str, path: str) -> Mesh:
    """The mesh of `parse_generation_mesh`, over the devices of this process group.

    Raises:
      ConfigError: as of `parse_generation_mesh` and `make_mesh`.
    """
    return make_mesh(parse_generation_mesh(text, path), path=path)
