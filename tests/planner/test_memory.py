"""What the compiler says of programs, against memory that is measured and bytes of arguments in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.planner.memory import groups, of_compiled, of_refusal
from vlm_jax.planner.settings import planned
from vlm_jax.planner.training import training_work
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import use_mesh

from ..memory import peak_bytes

G = 2**30


@pytest.mark.parametrize(
    ("message", "peak", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.00G) "
            "exceeds available HBM (15.75G).",
            38.0,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm "
            "capacity by 1.50G.\n\nTotal hbm usage >= 17.76G:",
            17.25,
            15.75,
        ),
    ],
)
def test_a_refused_program_needs_what_the_compiler_says(message, peak, available):
    found = of_refusal(message, 2 * G)
    assert not found.fits and found.peak == peak * G and found.available == available * G
    assert found.spare == (available - peak) * G and found.arguments + found.temporaries == found.peak


def test_another_failure_is_no_refusal():
    assert of_refusal("INTERNAL: RET_CHECK failure", 0) is None


def test_groups_have_the_bytes_of_their_shards():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)

    def leaf(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = groups(
        {
            "batch": {"tokens": leaf((8, 16), jnp.int32, ("data", "fsdp")), "key": key},
            "parameters": [leaf((64, 32), jnp.bfloat16, None, "fsdp"), leaf((64,), jnp.float32)],
            "average": None,
        }
    )
    assert [(one.name, one.bytes) for one in found] == [("parameters", 64 * 8 * 2 + 64 * 4), ("batch", 16 * 4)]


def test_a_training_step_takes_the_memory_that_is_forecast(config):
    """On a CPU: what the process has at its highest point, beyond the arguments, within a tenth."""
    with config.copy_and_resolve_references().unlocked() as larger:
        larger.stages.instruction.batch_size = 64
        larger.encoder.update({"width": 256, "remat": "none"})
        larger.decoder.update({"width": 256, "remat": "none", "depth": 4})
        larger.update({"dtype": "float32"})
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    work = training_work(*planned(larger, 1), mesh)
    with use_mesh(mesh):
        compiled = work.traced.lower().compile()
    forecast = of_compiled(compiled, 0)

    def filled(leaf, sharding):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return jax.device_put(jax.random.key(0), sharding)
        return jax.device_put(np.ones(leaf.shape, leaf.dtype), sharding)

    arguments = jax.block_until_ready(jax.tree.map(filled, compiled.args_info[0], compiled.input_shardings[0]))
    assert forecast.temporaries > 400 * 2**20
    measured = peak_bytes(lambda: jax.block_until_ready(compiled(*arguments)))
    assert measured + forecast.arguments == pytest.approx(forecast.peak, rel=0.1)
