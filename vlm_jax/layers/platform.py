"""The platform that a program is traced for, asked in one place: kernels follow the devices of the mesh."""

import jax


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh's devices inside `jax.set_mesh`, else of the process's default device.

    So a program that is traced for the devices of a topology, which the process does not have, gets their kernels.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
