"""What modules sow into `losses` is added to the loss that is minimised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.train.objectives import next_token
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
    run = jax.jit(jax.value_and_grad(next_token(experiment), has_aux=True))
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
    objective = jax.jit(next_token(experiment))
    value, metrics = objective(params, batch, jax.random.key(1))
    weights = learned.sum(axis=1) / learned.sum(axis=1).mean()
    rows = [
        objective(params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch), jax.random.key(1), weight)
        for row, weight in enumerate(weights)
    ]
    np.testing.assert_allclose(np.mean([row[0] for row in rows]), value, rtol=1e-5)
    for name in ("accuracy", "padding_share", "auxiliary_loss"):
        np.testing.assert_allclose(np.mean([row[1][name] for row in rows]), metrics[name], rtol=1e-5)
