"""Kernels follow the devices of the mesh, not those of the process."""

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.layers.platform import platform


def test_inside_a_mesh_its_devices_count(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert platform() == "tpu"
    seen = []
    with jax.set_mesh(Mesh(np.asarray(jax.devices()[:1]), ("data",))):
        jax.jit(lambda x: seen.append(platform()) or x)(1.0)
    assert seen == ["cpu"]
