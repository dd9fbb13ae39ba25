"""The flag that names the devices of a command that answers with a release."""

from absl import flags
from jax.sharding import Mesh

from vlm_jax.sharding.mesh import make_generation_mesh


def define() -> flags.FlagHolder[str | None]:
    """Defines `--mesh`."""
    return flags.DEFINE_string(
        "mesh",
        None,
        "Devices along the axes over which parameters and rows are sharded, such as tensor:4,data:2; -1 takes the "
        "remaining devices. data, if not named, takes the remaining devices, or is 1 if another axis is -1. One device "
        "if unset.",
    )


def chosen(text: str | None) -> Mesh | None:
    """The mesh of the flag's value; None where it is unset.

    Raises:
      ConfigError: as of `make_generation_mesh`.
    """
    return None if text is None else make_generation_mesh(text, "--mesh")
