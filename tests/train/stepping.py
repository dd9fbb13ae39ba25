"""Some steps of a batch, and comparison of what they give."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.leaves import flatten
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.sharding.rules import distribute, placed, shardings
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.state import TrainState, init_boxed
from vlm_jax.train.step import compile_step

from ..parameters import drawn

# Adam divides by the size of the gradient, so an epsilon keeps the rounding of gradients near 0 from becoming updates.
SETTINGS = OptimizerSettings(epsilon=1e-3, weight_decay=0.1)


def steps(experiment, batch, mesh, accumulate, *, count=3):
    """Metrics of each step, the parameters after the last, and the program; all parts are trained."""
    boxed = experiment.boxed_shapes()
    trained = frozenset(path for path, _ in flatten(boxed))
    tx = adamw(SETTINGS, dict.fromkeys(trained, 1e-2), 0, 10)
    like = placed(jax.eval_shape(lambda params: init_boxed(params, tx, trained), boxed), mesh)
    params = jax.tree.map(jax.device_put, nn.meta.unbox(drawn(boxed)), shardings(boxed, mesh))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    state = jax.tree.map(lambda leaf, other: jax.device_put(leaf, other.sharding), state, like)
    batch = distribute(batch, mesh)
    objective = NextToken().build(experiment)
    program = compile_step(
        like, batch, mesh, objective=objective, tx=tx, trained=trained, accumulate=accumulate, lora=experiment.lora
    )
    metrics = []
    for _ in range(count):
        state, found = program(state, batch, jax.random.key(1))
        metrics.append({name: float(value) for name, value in found.items()})
    return metrics, state.params, program


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5), got, want)
