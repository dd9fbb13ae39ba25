"""A small model, and its plans for two real slices; each is compiled once."""

import pytest
from jax.sharding import Mesh

from configs import digits
from vlm_jax.config import parse
from vlm_jax.planner import plan
from vlm_jax.planner.compiler import dumped_text, text_of
from vlm_jax.planner.plan import compile_plan
from vlm_jax.planner.settings import planned
from vlm_jax.planner.topology import open_topology
from vlm_jax.planner.training import training_work
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

WIDTH = 512  # four shards of 128, the lanes of a tile, so that arguments are not padded


@pytest.fixture(scope="session")
def config():
    """One stage of a model with two layers, rematerialised, sharded over all devices."""
    made = digits.get_config()
    with made.unlocked():
        made.schedule = ("instruction",)
        for label in list(made.stages):
            if label != "instruction":
                del made.stages[label]
        made.dtype = "bfloat16"
        made.encoder.update({"width": WIDTH, "depth": 1, "mlp_dim": 2 * WIDTH, "remat": "full"})
        made.decoder.update({"width": WIDTH, "depth": 2, "mlp_dim": 2 * WIDTH, "remat": "full"})
        made.mesh.update({"data": 1, "fsdp": -1})
    return made.lock()


def mesh_of(config, devices) -> Mesh:
    return make_mesh(parse(MeshSettings, config.mesh, "config.mesh"), devices)


@pytest.fixture(scope="session")
def compiled(config):
    plans, texts = {}, []

    def read(program, folder):
        texts.append((program.as_text(), dumped_text(folder)))
        return text_of(program, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "text_of", read)
        for name, quick in (("v5e:2x2", False), ("v5p:2x2x1", True)):
            topology = open_topology(name)
            own, experiment = planned(config, len(topology.devices))
            work = training_work(own, experiment, mesh_of(own, topology.devices))
            plans[name] = compile_plan(work, topology, quick=quick)
    return plans, texts[0]


@pytest.fixture(scope="session")
def trained(compiled):
    """Plans of its training step by name of the slice: one in full, one for its memory."""
    return compiled[0]


@pytest.fixture(scope="session")
def texts(compiled):
    """The text of the program that is compiled in full, as printed and as the compiler wrote it."""
    return compiled[1]
