"""The loss of next tokens: what modules sow into `losses` is added to it, and logits are never whole."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import distribute, shardings, use_mesh
from vlm_jax.train.objectives.next_token import NextToken, block_of_vocabulary
from vlm_jax.types import Batch

from ..parameters import drawn
from .conftest import tiny_config

LENGTH, EXPERTS = 6, 4
DECODER = {
    "kind": "deepseek",
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 16,
    "latent_dim": 8,
    "content_dim": 4,
    "rope_dim": 4,
    "value_dim": 4,
    "expert_dim": 8,
    "num_experts": EXPERTS,
    "num_selected": 2,
    "rope": {"theta": 100.0},
}


def text():
    rng = np.random.default_rng(0)
    shape = (2, LENGTH)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 11, size=shape), jnp.int32),
        positions=jnp.tile(jnp.arange(LENGTH)[None], (2, 1)),
        segment_ids=jnp.ones(shape, jnp.int32),
        visual_index=jnp.full(shape, -1),
        targets=jnp.asarray(rng.integers(0, 11, size=shape), jnp.int32),
        loss_weights=jnp.ones(shape),
    )


def experiment_of(weight):
    config = tiny_config().unlock()
    config.decoder = ConfigDict({**DECODER, "balance_weight": weight})
    return build(config)


def router(tree):
    return tree["decoder"]["sparse_1"]["layers"]["mlp"]["router"]["kernel"]


def minimised(experiment, params):
    """The loss, the metrics, and the gradients of the routers' kernels."""
    run = jax.jit(jax.value_and_grad(NextToken().build(experiment), has_aux=True))
    (value, metrics), grads = run(params, text(), jax.random.key(1))
    return value, metrics, router(grads)


def cross_entropy_and_inputs(model, params):
    """The cross entropy of the model's logits, and what its routers get."""

    @jax.jit
    def apply(variables):
        return model.apply(variables, text(), capture_intermediates=lambda part, _: part.name == "mlp_norm")

    logits, state = apply({"params": {"decoder": params["decoder"]}})
    inputs = state["intermediates"]["decoder"]["sparse_1"]["layers"]["mlp_norm"]["__call__"][0]
    return cross_entropy(logits, text().targets, text().loss_weights)[0], inputs


def imbalance(inputs, kernels):
    """The sum over layers of the mean over rows of the sum over experts of (share, 1 when even) * (mean score)."""
    total = 0.0
    for x, kernel in zip(inputs, kernels, strict=True):
        scores = np.asarray(jax.nn.softmax(x @ kernel))
        chosen = np.argsort(scores, axis=-1)[..., -2:]
        for row in range(2):
            share = np.bincount(chosen[row].ravel(), minlength=EXPERTS) * EXPERTS / (2 * LENGTH)
            total += (share * scores[row].mean(axis=0)).sum() / 2
    return total


def test_the_routers_balance_loss_is_added():
    experiment = experiment_of(0.5)
    params = nn.meta.unbox(drawn(experiment.boxed_shapes()))
    unbalanced, inputs = cross_entropy_and_inputs(experiment.system.model, params)
    expected = 0.5 * imbalance(inputs, router(params))
    value, metrics, grads = minimised(experiment, params)
    np.testing.assert_allclose(value - unbalanced, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["auxiliary_loss"], expected, rtol=1e-4)
    value, metrics, without = minimised(experiment_of(0.0), params)
    np.testing.assert_allclose(value, unbalanced, atol=1e-6)
    assert set(metrics) == {"accuracy", "padding_share"}
    assert np.abs(grads - without).max() > 1e-4


def test_the_mean_over_weighted_microbatches_is_that_of_the_batch():
    experiment = experiment_of(0.5)
    params = nn.meta.unbox(drawn(experiment.boxed_shapes()))
    learned = jnp.asarray([[1.0] + [0.0] * (LENGTH - 1), [1.0] * LENGTH])
    batch = dataclasses.replace(text(), loss_weights=learned)
    objective = jax.jit(NextToken().build(experiment))
    value, metrics = objective(params, batch, jax.random.key(1))
    weights = learned.sum(axis=1) / learned.sum(axis=1).mean()
    rows = [
        objective(params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch), jax.random.key(1), weight)
        for row, weight in enumerate(weights)
    ]
    np.testing.assert_allclose(np.mean([row[0] for row in rows]), value, rtol=1e-5)
    for name in ("accuracy", "padding_share", "auxiliary_loss"):
        np.testing.assert_allclose(np.mean([row[1][name] for row in rows]), metrics[name], rtol=1e-5)


def shapes_of(jaxpr):
    """Shapes of all values of a program, and of the programs in it."""
    for equation in jaxpr.eqns:
        yield from (tuple(value.aval.shape) for value in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_step_are_never_whole(tied):
    """With a bound below the bytes of all logits, no value of the gradient's program has ids at all positions."""
    config = tiny_config().unlock()
    config.decoder.tie_embeddings = tied
    experiment = build(config)
    vocab_size = experiment.system.model.decoder.vocab_size
    params = nn.meta.unbox(drawn(experiment.boxed_shapes()))
    whole = 2 * LENGTH * vocab_size

    def gradient(logits_bytes, z_loss=0.0):
        return jax.value_and_grad(NextToken(z_loss, logits_bytes).build(experiment), has_aux=True)

    def has_logits(logits_bytes):
        program = jax.make_jaxpr(gradient(logits_bytes))(params, text(), jax.random.key(1))
        return any(math.prod(shape) == whole and vocab_size in shape for shape in shapes_of(program.jaxpr))

    assert has_logits(4 * whole)
    assert not has_logits(4 * whole - 1) and not has_logits(4 * whole // 3)
    args = params, text(), jax.random.key(1)
    (value, metrics), grads = jax.jit(gradient(4 * whole, 0.1))(*args)
    (by_blocks, same), others = jax.jit(gradient(4 * whole // 3, 0.1))(*args)
    np.testing.assert_allclose(by_blocks, value, rtol=1e-6)
    assert metrics["z_loss"] > 0
    for name, metric in metrics.items():
        np.testing.assert_allclose(same[name], metric, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, others)


def test_a_block_is_sized_by_a_devices_share():
    shape, all_bytes = (4, 8, 96), 4 * 4 * 8 * 96
    assert block_of_vocabulary(shape, all_bytes) == (96, 1)
    assert block_of_vocabulary(shape, all_bytes - 1) == (48, 1)
    assert block_of_vocabulary(shape, 1) == (1, 1)
    assert block_of_vocabulary(shape, None) == (96, 1)
    assert block_of_vocabulary((2, 320, 32_000), None) == (32_000, 1)  # 128 MiB are 52,428 ids at 640 positions
    assert block_of_vocabulary((2, 320, 64_000), None) == (32_000, 1)
    assert block_of_vocabulary((64, 1024, 5120), None) == (512, 1)
    with use_mesh(make_mesh(MeshSettings(data=2, context=2, tensor=2))):
        assert block_of_vocabulary(shape, all_bytes // 8) == (48, 2)
        assert block_of_vocabulary(shape, all_bytes // 16) == (24, 2)
        assert block_of_vocabulary((4, 8, 97), all_bytes // 16) == (20, 1)  # 2 do not divide 97: 5 blocks of up to 24


def test_blocks_over_eight_devices_are_those_of_one():
    experiment = build(tiny_config())
    boxed = experiment.boxed_shapes()
    params = nn.meta.unbox(drawn(boxed))
    found = []
    for settings in (MeshSettings(), MeshSettings(data=2, context=2, tensor=2)):
        mesh = make_mesh(settings, jax.devices()[: 1 if settings.data == -1 else 8])
        with use_mesh(mesh):
            step = jax.jit(jax.value_and_grad(NextToken(0.1, 48).build(experiment), has_aux=True))
            placed = jax.device_put(params, shardings(boxed, mesh)), distribute(text(), mesh)
            found.append(step(*placed, jax.random.key(1)))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6)
