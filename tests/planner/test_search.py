"""The order of a search, with plans whose memory and time are given."""

import dataclasses

from configs import siglip_digits
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.encoders.resnet import ModifiedResNet
from vlm_jax.planner.memory import Memory
from vlm_jax.planner.request import Request
from vlm_jax.planner.search import meshes, search
from vlm_jax.planner.settings import has_experts, remat_parts
from vlm_jax.planner.topology import PlanError
from vlm_jax.sharding.mesh import MeshSettings

GIB = 2**30
PEAKS = {"none": 20, "dots": 18, "full": 8}
SECONDS = {("full", "fsdp"): 0.6, ("none", "tensor"): 0.4, ("dots", "data"): 0.5}


def widest(mesh):
    return next((name for name in ("tensor", "data", "context", "expert") if mesh[name] > 1), "fsdp")


def test_of_each_mesh_the_least_recomputation_that_fits_is_timed(config, trained):
    """Four chips of 16 GiB; tensor parallelism halves the memory, data parallelism takes more in its last program."""
    asked = []

    def make(request, folder, working):
        del folder, working
        remat, mesh = request.config.decoder.remat, request.config.mesh
        assert request.config.encoder.remat == remat
        if mesh.tensor == 4:
            raise ConfigError("config.mesh: heads cannot be divided")
        kind = widest(mesh)
        if kind == "context" and not request.quick:
            raise PlanError("the compiler failed")
        asked.append((remat, kind, request.quick))
        peak = PEAKS[remat] * GIB // (2 if kind == "tensor" else 1) - (4 * GIB if kind == "data" else 0)
        full, fits = trained["v5e:2x2"], peak <= 15 * GIB and mesh.data < 4
        used = Memory(0, 0, peak, 0, peak, 16 * GIB, fits)
        time = None if request.quick else dataclasses.replace(full.step_time, seconds=SECONDS[remat, kind])
        return dataclasses.replace(full, memory=used, step_time=time), False

    found = search(Request(config, "v5e:2x2"), None, make=make)
    timed = [one for one in found if one.plan is not None and one.plan.step_time is not None]
    assert [(one.remat, widest(one.mesh)) for one in timed] == [("none", "tensor"), ("dots", "data"), ("full", "fsdp")]
    assert found[: len(timed)] == timed
    # Sequences over 2 and over 4 chips fit, and fail when compiled for their time.
    assert [(one.remat, one.plan.memory.fits) for one in found[3:5]] == [("full", True)] * 2
    assert not any(one.plan.memory.fits for one in found[5:-1]) and "heads cannot be divided" in found[-1].refused
    assert ("dots", "tensor", True) not in asked and ("full", "data", False) not in asked


def test_meshes_use_every_device_and_keep_what_is_set():
    found = list(meshes(12, MeshSettings(), experts=True))
    assert all(mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["context"] * mesh["expert"] == 12 for mesh in found)
    assert [(widest(mesh), 12 // mesh["fsdp"]) for mesh in found] == [
        ("fsdp", 1),
        *(("tensor", 2), ("tensor", 4)),
        *(("data", 2), ("data", 4)),
        *(("context", 2), ("context", 4)),
        *(("expert", 2), ("expert", 4)),
    ]
    kept = list(meshes(16, MeshSettings(data=1, fsdp=-1, context=4), experts=False))
    assert {mesh["context"] for mesh in kept} == {4} and {mesh["expert"] for mesh in kept} == {1}
    assert [(mesh["fsdp"], mesh["tensor"], mesh["data"]) for mesh in kept] == [
        (4, 1, 1),
        *((2, 2, 1), (1, 4, 1)),
        *((2, 1, 2), (1, 1, 4)),
    ]


def test_only_parts_with_a_policy_are_rematerialised(config):
    own = build(config)
    assert remat_parts(own.system.model) == ("encoder", "decoder") and not has_experts(own.system)
    assert remat_parts(build(siglip_digits.get_config()).system.model) == ("encoder", "decoder")
    without = ModifiedResNet((32, 32), (1, 1, 1, 1), 8, 4, 32)
    assert remat_parts(own.system.model.clone(encoder=without)) == ("decoder",)
