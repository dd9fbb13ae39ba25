"""The interface of `vlm_jax.connectors`, for every kind under test: `from vlm_jax.testing.connectors import *`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid
from vlm_jax.connectors import CONNECTORS
from vlm_jax.sharding.rules import distribute, shardings, use_mesh
from vlm_jax.testing.kinds import SIZES, check_names, leaves, small, under_test
from vlm_jax.testing.parameters import drawn
from vlm_jax.types import VisualFeatures

GRIDS = [(8, 8), (7, 5), (1, 6), (4, 8)]
WIDTH_IN, WIDTH_OUT, BATCH = 12, 16, 4

every_kind = pytest.mark.parametrize("kind", under_test(CONNECTORS, "register_connector"))
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def images(grid, masked=0.0, batch=BATCH, seed=0):
    """Random features; a share `masked` of each image is masked."""
    rng = np.random.default_rng(seed)
    count = grid[0] * grid[1]
    tokens = rng.normal(size=(batch, count, WIDTH_IN)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.asarray(rng.uniform(size=(batch, count)) >= masked), grid)


@functools.cache
def feasible(kind, grid):
    """Every budget up to a little more than the features, and what `for_budget` says to it."""
    answers = {}
    for budget in range(-1, grid[0] * grid[1] + 4):
        try:
            answers[budget] = CONNECTORS[kind].for_budget(budget, grid)
        except InfeasibleBudget as error:
            answers[budget] = error
    return answers


def accepted(kind, grid):
    return [budget for budget, answer in feasible(kind, grid).items() if isinstance(answer, dict)]


def solve(kind, grid, budget=None, **fields):
    """A connector of that kind, for the accepted budget nearest to a quarter of the features."""
    if budget is None:
        budget = min(accepted(kind, grid), key=lambda b: abs(b - grid[0] * grid[1] / 4))
    solved = CONNECTORS[kind].for_budget(budget, grid)
    return small(CONNECTORS[kind], features=WIDTH_OUT, **solved, **fields)


@functools.cache
def trained(kind, grid=(4, 8)):
    """A connector and boxed parameters."""
    connector = solve(kind, grid)
    init = functools.partial(connector.init, deterministic=True)
    return connector, drawn(jax.eval_shape(init, jax.random.key(0), images(grid)))


@functools.cache
def apply(connector):
    return jax.jit(functools.partial(connector.apply, deterministic=True))


@every_kind
@every_grid
def test_every_accepted_budget_is_met(kind, grid):
    assert accepted(kind, grid), f"{kind} accepts no budget at all on {grid}"
    for budget in accepted(kind, grid):
        assert solve(kind, grid, budget).num_tokens(grid) == budget  # before there is a parameter
    step = -(-len(accepted(kind, grid)) // 2)  # tracing takes its time
    for budget in {*accepted(kind, grid)[::step], accepted(kind, grid)[-1]}:
        connector = solve(kind, grid, budget)
        init = functools.partial(connector.init_with_output, deterministic=True)
        out, _ = jax.eval_shape(init, jax.random.key(0), images(grid))
        assert out.tokens.shape == (BATCH, budget, WIDTH_OUT)
        assert out.mask.shape == (BATCH, budget) and out.mask.dtype == bool


@every_kind
@every_grid
def test_a_refusal_names_the_nearest_budgets_that_are_met(kind, grid):
    answers, good = feasible(kind, grid), accepted(kind, grid)
    for budget in (b for b in answers if b not in good):
        message = str(answers[budget])
        assert kind in message and f"{grid[0]}x{grid[1]}" in message and str(budget) in message
        named = {int(number) for number in re.findall(r"\d+", message.split("feasible:")[1])}
        below, above = [b for b in good if b < budget], [b for b in good if b > budget]
        assert named == {*below[-1:], *above[:1]}, message


@every_kind
def test_no_budget_below_one_is_met(kind):
    assert min(accepted(kind, (8, 8))) >= 1


@every_kind
@pytest.mark.parametrize("grid", [(7, 5), (1, 6), (5, 8), (16, 16)], ids=str)
def test_a_connector_of_another_grid_counts_right_or_refuses_by_name(kind, grid):
    connector = solve(kind, (8, 8), 16 if 16 in accepted(kind, (8, 8)) else None)
    init = functools.partial(connector.init_with_output, deterministic=True)
    try:
        count = connector.num_tokens(grid)
    except InfeasibleGrid as error:
        assert kind in str(error) and f"{grid[0]}x{grid[1]}" in str(error)
        with pytest.raises(InfeasibleGrid, match=kind):
            jax.eval_shape(init, jax.random.key(0), images(grid))
    else:
        out, _ = jax.eval_shape(init, jax.random.key(0), images(grid))
        assert out.tokens.shape[1] == count


@every_kind
def test_what_a_masked_feature_holds_changes_nothing(kind):
    connector, params = trained(kind)
    clean = images((4, 8), masked=0.5)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, features):
        out = connector.apply(params, features, deterministic=True)
        return jnp.sum(jnp.sin(out.tokens)), out

    (_, expected), expected_grads = run(params, clean)
    expected_grads = leaves(expected_grads)
    for garbage in (np.nan, np.inf, -1e30):
        dirty = VisualFeatures(jnp.where(clean.mask[..., None], clean.tokens, garbage), clean.mask, clean.grid)
        (_, got), grads = run(params, dirty)
        np.testing.assert_array_equal(got.tokens, expected.tokens, err_msg=str(garbage))
        np.testing.assert_array_equal(got.mask, expected.mask, err_msg=str(garbage))
        for path, grad in leaves(grads).items():
            np.testing.assert_array_equal(grad, expected_grads[path], err_msg=f"{path} of {garbage}")


@every_kind
def test_features_in_blocks_give_what_those_in_rows_give_or_are_refused_by_name(kind):
    """The features of packed images: blocks of 4x4 on a strip of 4 rows."""
    connector, params = trained(kind)
    rows = images((4, 8), masked=0.3)
    order = np.arange(32).reshape(4, 2, 4).swapaxes(0, 1).reshape(-1)
    blocks = VisualFeatures(rows.tokens[:, order], rows.mask[:, order], (4, 8), block=4)
    try:
        got = apply(connector)(params, blocks)
    except InfeasibleGrid as error:
        assert kind in str(error) and "4x8" in str(error)
        return
    expected = apply(connector)(params, rows)
    for i in range(BATCH):
        ours, theirs = got.tokens[i][got.mask[i]], expected.tokens[i][expected.mask[i]]
        assert len(ours) == len(theirs)
        distances = np.abs(ours[:, None] - theirs[None]).max(-1)
        assert (distances.min(0) <= 1e-5).all() and (distances.min(1) <= 1e-5).all()


@every_kind
def test_a_token_is_real_when_a_real_feature_reaches_it(kind):
    connector, params = trained(kind)
    weights = jax.random.normal(jax.random.key(3), (1, 1, WIDTH_OUT))

    @jax.jit
    def reach(tokens):
        features = VisualFeatures(tokens, jnp.ones(tokens.shape[:2], bool), (4, 8))
        return jnp.sum(connector.apply(params, features, deterministic=True).tokens * weights, axis=-1)[0]

    jacobian = jax.jit(jax.jacrev(reach))(images((4, 8), batch=1).tokens)  # [M, 1, N, D_v]
    reached = np.any(np.asarray(jacobian)[:, 0] != 0, axis=-1)
    assert reached.any(axis=1).all(), "a token that no feature reaches"

    features = images((4, 8), masked=0.7, batch=8)
    mask = features.mask.at[0].set(True).at[1].set(False)  # a whole image, and none
    out = apply(connector)(params, VisualFeatures(features.tokens, mask, features.grid))
    np.testing.assert_array_equal(out.mask, (np.asarray(mask)[:, None] & reached).any(-1))
    assert np.isfinite(out.tokens).all()


@every_kind
def test_every_parameter_has_a_finite_gradient(kind):
    connector, params = trained(kind)

    def loss(params):  # as in training, where a kind may draw
        out = connector.apply(params, images((4, 8)), deterministic=False, rngs={"connect": jax.random.key(0)})
        return jnp.sum(jnp.sin(out.tokens + jnp.arange(WIDTH_OUT)[None, None]))

    for path, grad in leaves(jax.jit(jax.grad(loss))(params)).items():
        assert np.isfinite(grad).all(), path
        # Softmax does not see what is added to all keys alike: the bias of keys, or of a norm that keys alone have.
        if not path.endswith(("['key']['bias']", "['key_norm']['bias']")):
            assert np.abs(grad).max() > 1e-4, path


@every_kind
def test_bfloat16_is_near_to_float32(kind):
    connector, params = trained(kind)
    features = images((4, 8), masked=0.3)
    exact = np.asarray(apply(connector)(params, features).tokens)
    half = connector.clone(dtype=jnp.bfloat16)
    low = VisualFeatures(features.tokens.astype(jnp.bfloat16), features.mask, features.grid)
    for given in (features, low):
        out = apply(half)(params, given)
        assert out.tokens.dtype == jnp.bfloat16
        error = np.linalg.norm(np.float32(out.tokens) - exact) / np.linalg.norm(exact)
        assert error < 0.02


@every_kind
def test_parameters_are_stored_in_param_dtype(kind):
    connector = trained(kind)[0].clone(param_dtype=jnp.bfloat16)
    init = functools.partial(connector.init, deterministic=True)
    params = jax.eval_shape(init, jax.random.key(0), images((4, 8)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@every_kind
def test_every_dimension_of_every_parameter_is_named(kind):
    connector = solve(kind, (8, 8))
    init = functools.partial(connector.init, deterministic=True)
    boxed = jax.eval_shape(init, jax.random.key(0), images((8, 8)))
    check_names(boxed, getattr(connector, "depth", SIZES["depth"]))


@every_kind
def test_sharded_equals_unsharded(kind, mesh):
    connector, boxed = trained(kind)
    params = nn.meta.unbox(boxed)
    features = images((4, 8), masked=0.3, batch=8)
    expected = apply(connector)(params, features)
    placed = jax.device_put(params, shardings(boxed, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with use_mesh(mesh):
        run = jax.jit(functools.partial(connector.apply, deterministic=True))
        got = run(placed, distribute(features, mesh))
    np.testing.assert_allclose(got.tokens, expected.tokens, atol=1e-5)
    np.testing.assert_array_equal(got.mask, expected.mask)
