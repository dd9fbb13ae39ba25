"""Nested tokens as their papers define them, and one training that serves every budget."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from tests.train.conftest import tiny_config
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.connectors.matryoshka import POOLING, QUERIES, Matryoshka
from vlm_jax.data.loader import join
from vlm_jax.types import Sample, Turn, VisualFeatures, dialogue

from ..advice import tried
from ..parameters import drawn

WIDTH, BUDGETS = 8, (1, 4, 16, 64)
SETTINGS = {
    "c_abstractor": {"depth": 1},
    "perceiver": {"depth": 2, "num_heads": 2},
    "qformer": {"width": 12, "depth": 2, "num_heads": 2, "mlp_dim": 16},
    "resampler": {"num_heads": 2},
}


def features(batch=2, grid=(8, 8), width=6):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(batch, grid[0] * grid[1], width)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.ones(tokens.shape[:2], bool), grid)


def nested(kind, budget, budgets=BUDGETS):
    inner = {"kind": kind, **SETTINGS.get(kind, {})}
    return Matryoshka(WIDTH, **Matryoshka.for_budget(budget, (8, 8), inner=inner, budgets=budgets))


def params_of(kind):
    init = jax.eval_shape(lambda x: nested(kind, 64).init(jax.random.key(0), x, deterministic=True), features())
    return nn.meta.unbox(drawn(init))


def run(connector, params, **settings):
    call = jax.jit(lambda p, x: connector.apply(p, x, **{"deterministic": True, **settings}))
    return call(params, features())


@pytest.mark.parametrize("kind", [*POOLING, *QUERIES])
def test_the_parameters_are_the_same_for_all_budgets(kind):
    def shapes(budget):
        init = functools.partial(nested(kind, budget).init, deterministic=True)
        boxed = jax.eval_shape(init, jax.random.key(0), features())
        return jax.tree.map(lambda leaf: leaf.shape, nn.meta.unbox(boxed))

    assert all(shapes(budget) == shapes(64) for budget in BUDGETS)


def test_coarse_tokens_are_means_of_fine_ones():
    """Cai et al.: each set of tokens is the 2x2 average pooling of the next finer, then the projector."""
    params = params_of("pool")
    mlp = jax.tree.map(np.float64, params["params"]["inner"]["mlp"])
    erf = np.vectorize(math.erf)
    x = np.float64(features().tokens).reshape(2, 8, 8, 6)
    for budget in (64, 16, 4, 1):
        y = x.reshape(2, budget, 6) @ mlp["up"]["kernel"] + mlp["up"]["bias"]
        y = y * 0.5 * (1 + erf(y / np.sqrt(2))) @ mlp["down"]["kernel"] + mlp["down"]["bias"]
        got = run(nested("pool", budget), params)
        assert got.tokens.shape == (2, budget, WIDTH) and got.mask.all()
        np.testing.assert_allclose(got.tokens, y, atol=1e-5)
        side = x.shape[1]
        if side > 1:
            x = x.reshape(2, side // 2, 2, side // 2, 2, 6).mean((2, 4))


@pytest.mark.parametrize("kind", QUERIES)
def test_a_budget_takes_the_first_queries(kind):
    """Hu et al.: the first m of M queries go through the transformer, as if there were no others."""
    params = params_of(kind)
    for budget in BUDGETS:
        got = run(nested(kind, budget), params)
        assert got.tokens.shape == (2, budget, WIDTH)
        if kind == "resampler":  # no query reads another, and each keeps its place
            expected = run(QUERIES[kind](WIDTH, 64, **SETTINGS[kind]), {"params": params["params"]["inner"]}).tokens
            expected = expected[:, :budget]
        else:
            inner = {**params["params"]["inner"], "queries": params["params"]["inner"]["queries"][:budget]}
            alone = QUERIES[kind](features=WIDTH, num_queries=budget, **SETTINGS[kind])
            expected = run(alone, {"params": inner}).tokens
        np.testing.assert_allclose(got.tokens, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["pool", "resampler"])
def test_training_draws_every_budget_up_to_its_own_and_masks_the_rest(kind):
    params, connector = params_of(kind), nested(kind, 16)
    call = jax.jit(lambda key: connector.apply(params, features(), deterministic=False, rngs={"connect": key}))
    counts = collections.Counter()
    expected = {budget: run(nested(kind, budget), params).tokens for budget in (1, 4, 16)}
    for number in range(90):
        out = call(jax.random.key(number))
        assert out.tokens.shape == (2, 16, WIDTH)
        real = np.asarray(out.mask).sum(1)
        assert real[0] == real[1] and out.mask[:, : real[0]].all()
        counts[int(real[0])] += 1
        if counts[int(real[0])] == 1:
            np.testing.assert_allclose(out.tokens[:, : real[0]], expected[int(real[0])], atol=1e-5)
    assert set(counts) == {1, 4, 16}
    assert sum((count - 30) ** 2 / 30 for count in counts.values()) < 13.8  # chi-square, 2 degrees, 1 in 1000


def experiment(budget, budgets=(1, 2, 4), **inner):
    config = tiny_config()
    with config.unlocked():
        config.token_budget = budget
        config.connector = ConfigDict({"kind": "matryoshka", "budgets": budgets, "inner": {"kind": "pool", **inner}})
    return build(config)


def test_a_drawn_budget_in_training_is_that_budget_at_inference():
    """What is masked takes no position: the answers' logits are those of the shorter sequence."""
    whole = experiment(4)
    rng = np.random.default_rng(0)
    messages = dialogue([Turn("count 7", "2"), Turn("read row 1 column 2", "3")], num_images=1)
    samples = [Sample(str(i), messages, (rng.integers(0, 256, (24, 24, 1), np.uint8),)) for i in range(2)]
    params = nn.meta.unbox(drawn(whole.boxed_shapes()))
    batch = jax.tree.map(jnp.asarray, join([whole.training_row(sample) for sample in samples]))

    @jax.jit
    def train(key):
        settings = {"deterministic": False, "rngs": {"connect": key}}
        out = whole.system.model.apply({"params": params}, batch.images[:, 0], method="visual_tokens", **settings)
        return whole.system.model.apply({"params": params}, batch, **settings), out.mask.sum(1)

    met = set()
    for number in range(8):
        logits, counts = train(jax.random.key(number))
        count = int(counts[0])
        if count in met:
            continue
        met.add(count)
        short = experiment(count)
        assert short.system.budget.entering == count
        expected_batch = join([short.training_row(sample) for sample in samples])
        expected = jax.jit(lambda b, model=short.system.model: model.apply({"params": params}, b))(expected_batch)
        assert expected_batch.tokens.shape[1] == batch.tokens.shape[1] - 4 + count  # really fewer
        learned, also = batch.loss_weights > 0, expected_batch.loss_weights > 0
        assert learned.sum() == also.sum() > 0
        np.testing.assert_allclose(logits[learned], expected[also], atol=1e-4)
    assert met == {1, 2, 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 3}, InfeasibleBudget, r"matryoshka cannot give 3 .* budgets are \(1, 2, 4\); .*: 2 and 4"),
        ({"budgets": (1, 3, 4)}, InfeasibleBudget, "matryoshka: config.token_budget: pool cannot give 3 tokens"),
        ({"kind": "resampller"}, ConfigError, "config.connector.inner.kind: no kind 'resampller'; .*'resampler'"),
        ({"kind": "mlp"}, ConfigError, "config.connector.inner.kind: no kind 'mlp'"),
        ({"output_grid": (1, 1)}, ConfigError, "config.connector.inner.output_grid: .* derived"),
        ({"width": 2}, ConfigError, "config.connector.inner.width: unknown"),
        ({"kind": "perceiver", "depth": "2"}, ConfigError, "config.connector.inner.depth: expected int"),
    ],
)
def test_what_cannot_be_nested_is_named(change, error, message):
    with pytest.raises(error, match=message):
        experiment(**{"budget": 4, **change})


def test_grids_that_do_not_divide_are_not_nested():
    with pytest.raises(
        InfeasibleBudget, match=tried("for a {8}x{8} grid, which are not nested; choose budgets whose grids divide")
    ):
        nested("pool", 9, (4, 9))
    assert nested("pool", 16, (4, 16)).budgets == (4, 16)
    assert nested("pool", 16, None).budgets == (1, 2, 4, 8, 16)
    assert nested("pool", 6, None).budgets == (6,)  # 2x3, and 1x3 would be too flat


def test_a_connector_of_another_training_has_other_parameters():
    assert dataclasses.replace(nested("pool", 4), token_budget=1).num_tokens((8, 8)) == 1
