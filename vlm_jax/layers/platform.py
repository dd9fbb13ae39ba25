"""The platform that a program is traced for: kernels are chosen for the devices of the mesh."""

import jax


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh's devices inside `jax.set_mesh`, else of the process's default device.

    So a program that is traced for a topology whose devices the process does not have gets their kernels.
    """
    # Not every supported version of JAX gives the platform of an abstract mesh.
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()
