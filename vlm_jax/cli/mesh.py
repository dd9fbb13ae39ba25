"""The flag that names the devices of a command that answers with a release."""

from absl import flags
from jax.sharding import Mesh

from vlm_jax.sharding.mesh import parse_generation_mesh


def define() -> flags.FlagHolder[str | None]:
    """Defines `--mesh`."""
    return flags.DEFINE_string(
        "mesh",
        None,
        "Devices along the axes over which parameters and rows are sharded, such as tensor:4,data:2; -1 takes the "
        "rest, and so does data where it is not named. One device if unset.",
    )


def chosen(text: str | None) -> Mesh | None:
    """The mesh of the flag's value; None where it is unset.

    Raises:
      ConfigError: as of `parse_generation_mesh`.
    """
    return None if text is None else parse_generation_mesh(text, "--mesh")
