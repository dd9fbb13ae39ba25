"""The interface of `vlm_jax.reducers`, for every kind under test: `from vlm_jax.testing.reducers import *`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import keys_of
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import ENCODERS
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.testing.kinds import SIZES, small, under_test
from vlm_jax.types import Guidance, VisualFeatures

LAYERS = 5  # of the part that a kind works in

GRIDS = [(8, 8), (7, 5), (1, 6), (4, 8)]
PATCH = 6

# "none" is not a module: it is None in the table, and `build` omits the reducer.
CLASSES = {kind: cls for kind in under_test(REDUCERS, "register_reducer") if (cls := REDUCERS[kind]) is not None}
KINDS = list(CLASSES)
every_kind = pytest.mark.parametrize("kind", KINDS)
# Where a kind works says what is to be seen of it: fewer features, a smaller grid from the encoder, or drops.
IN_ENCODER = [kind for kind in KINDS if CLASSES[kind].reduces_in == "encoder"]
IN_DECODER = [kind for kind in KINDS if CLASSES[kind].reduces_in == "decoder"]
BEFORE_CONNECTOR = [kind for kind in KINDS if kind not in IN_ENCODER + IN_DECODER]
before_connector = pytest.mark.parametrize("kind", BEFORE_CONNECTOR)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def numbered(grid, batch=3, mask=None):
    """Features that hold their image's and their own number."""
    count = grid[0] * grid[1]
    image, place = np.meshgrid(np.arange(batch), np.arange(count), indexing="ij")
    tokens = np.stack([image, place], axis=-1).astype(np.float32)
    mask = np.ones((batch, count), bool) if mask is None else mask
    rng = np.random.default_rng(0)
    return VisualFeatures(
        jnp.asarray(tokens),
        jnp.asarray(mask),
        grid,
        saliency=jnp.asarray(rng.uniform(size=(batch, count)), jnp.float32),
        keys=jnp.asarray(rng.normal(size=(batch, count, 2, 4)), jnp.float32),
        guidance=Guidance(
            jnp.asarray(rng.normal(size=(batch, count, 5)), jnp.float32),
            jnp.asarray(rng.normal(size=(batch, 2, 5)), jnp.float32),
            jnp.asarray(np.arange(2 * batch).reshape(batch, 2) != 3),
        ),
    )


def solve(kind, budget, grid):
    return solve_for(kind, budget, grid, LAYERS)


def solve_for(kind, budget, grid, num_layers):
    fields = {"layer": 1} if "layer" in keys_of(CLASSES[kind]) else {}
    return small(CLASSES[kind], **CLASSES[kind].for_budget(budget, grid, num_layers), **fields)


@functools.cache
def split_budgets(kind, grid):
    """(accepted budgets with their reducers, rejected ones with their messages)."""
    good, bad = {}, {}
    for budget in range(-1, grid[0] * grid[1] + 4):
        try:
            good[budget] = solve(kind, budget, grid)
        except InfeasibleBudget as error:
            bad[budget] = str(error)
    return good, bad


def shows_fewer_pixels(kind):
    """Whether a kind reduces the image, and passes features on."""
    return solve(kind, 16, (8, 8)).image_size(8 * PATCH, 8 * PATCH, (8, 8)) != (8 * PATCH, 8 * PATCH)


def reduce(reducer, features, *, key=None, deterministic=True):
    rngs = {} if key is None else {"reduce": key}
    return jax.jit(lambda features: reducer.apply({}, features, deterministic=deterministic, rngs=rngs))(features)


@every_kind
@every_grid
def test_every_accepted_budget_is_met_by_a_reducer(kind, grid):
    good, _ = split_budgets(kind, grid)
    assert good
    height, width = grid[0] * PATCH, grid[1] * PATCH
    for budget, reducer in good.items():
        size = reducer.image_size(height, width, grid)
        shown = (size[0] // PATCH, size[1] // PATCH)  # the grid that the encoder then gives
        assert all(1 <= small <= full for small, full in zip(size, (height, width), strict=True))
        reduced = reducer.reduced_grid(shown)
        count = reduced[0] * reduced[1]
        asked = reducer.required_fields()
        if kind in IN_DECODER:
            assert count == reducer.connector_budget(shown) == shown[0] * shown[1]  # all are shown
            assert asked["decoder"]["drops"][-1].num_kept == budget
            continue
        assert count == reducer.connector_budget(shown) == budget
        if kind in IN_ENCODER:
            assert shown[0] * shown[1] - sum(asked["encoder"]["merged"]) == budget
            continue
        if CLASSES[kind].reduces_clips and 2 < budget < grid[0] * grid[1] - 1 and budget % 10:
            continue  # these take long to trace
        shape = jax.eval_shape(lambda f, r=reducer: r.apply({}, f, deterministic=True), numbered(shown))
        assert shape.grid == reduced
        assert shape.tokens.shape == (3, budget, 2) and shape.mask.shape == (3, budget)
        assert reducer.num_left(shown[0] * shown[1]) == budget
        if not shows_fewer_pixels(kind):
            assert shape.kept.shape == (3, budget)


@every_kind
def test_a_kind_is_a_reducer_that_leaves_an_image_with_fewer_tokens_as_it_is(kind):
    reducer = solve(kind, 16, (8, 8))
    assert isinstance(reducer, Reducer)
    assert (reducer.rule, reducer.positions) == ("exact", "keep" if kind in IN_DECODER else "consecutive")
    assert [reducer.num_left(count) for count in (0, 9, 16)] == [0, 9, 16]
    if kind in IN_DECODER:
        assert [reducer.required_fields()["decoder"]["drops"][-1].num_left(n) for n in (9, 64)] == [9, 16]
        return
    few = numbered((3, 3))
    np.testing.assert_array_equal(reduce(reducer, few).tokens, few.tokens)


@before_connector
def test_kept_says_which_features_are_left(kind):
    if shows_fewer_pixels(kind):
        return
    reducer = solve(kind, 16, (8, 8))
    features = numbered((8, 8))
    units = jnp.broadcast_to(jnp.eye(64)[None], (3, 64, 64))
    out = reduce(reducer, dataclasses.replace(features, tokens=units))
    tokens = np.asarray(out.tokens)
    weights = np.take_along_axis(tokens, np.asarray(out.kept)[..., None], axis=2)[..., 0]
    is_mean = (weights > 0) & np.isclose(tokens.sum(axis=2), 1, atol=1e-6)
    np.testing.assert_array_equal((weights == 1) | is_mean, True)  # it is there once, whatever was added, or averaged


@every_kind
@every_grid
def test_a_refusal_of_a_reducer_names_the_nearest_budgets_that_are_met(kind, grid):
    good, bad = split_budgets(kind, grid)
    assert min(good) >= 1 and max(bad) > grid[0] * grid[1]  # no reducer makes features
    for budget, message in bad.items():
        assert kind in message and f"{grid[0]}x{grid[1]}" in message and str(budget) in message
        named = {int(number) for number in re.findall(r"\d+", message.split("feasible:")[1])}
        below, above = [b for b in good if b < budget], [b for b in good if b > budget]
        assert named == {*below[-1:], *above[:1]}, message


@before_connector
def test_what_is_left_stands_in_order(kind):
    """Features that are unit vectors show the composition of each remaining one."""
    reducer = solve(kind, 16, (8, 8))
    shown = tuple(side // PATCH for side in reducer.image_size(8 * PATCH, 8 * PATCH, (8, 8)))
    features = numbered(shown)
    units = jnp.broadcast_to(jnp.eye(features.tokens.shape[1])[None], (3, *(features.tokens.shape[1],) * 2))
    out = reduce(reducer, dataclasses.replace(features, tokens=units))
    for image in np.asarray(out.tokens):
        place = -1
        for made_of in image:
            place = min(i for i in np.flatnonzero(made_of) if i > place)  # raises where there is none


@every_kind
def test_an_image_depends_on_no_other(kind):
    reducer = solve(kind, 16, (8, 8))
    shown = tuple(side // PATCH for side in reducer.image_size(8 * PATCH, 8 * PATCH, (8, 8)))
    features = numbered(shown)
    alone = reduce(reducer, jax.tree.map(lambda leaf: leaf[2:], features))
    np.testing.assert_allclose(reduce(reducer, features).tokens[2], alone.tokens[0], atol=1e-5)


@every_kind
def test_what_a_kind_asks_for_is_a_field_and_changes_no_parameter(kind):
    grid = (SIZES["image_size"][0] // SIZES["patch_size"], SIZES["image_size"][1] // SIZES["patch_size"])

    def run(module, part):
        tokens = jnp.zeros((1, 4), jnp.int32)
        inputs = (jnp.zeros((2, *SIZES["image_size"], 3)),)
        if part == "decoder":
            inputs = (jnp.zeros((1, 4, module.width)), tokens, tokens)
        return module.init_with_output(jax.random.key(0), *inputs)

    for part, fields in solve_for(kind, 9, grid, SIZES["depth"]).required_fields().items():
        plain = small({"encoder": ENCODERS["vit"], "decoder": DECODERS["transformer"]}[part])
        assert all(hasattr(plain, field) for field in fields)
        changed = plain.clone(**fields)
        expected, got = (jax.eval_shape(functools.partial(run, module, part)) for module in (plain, changed))
        if part == "encoder":
            assert got[0].grid == ((1, 9) if kind in IN_ENCODER else grid)
            assert got[0].tokens.shape[1] == got[0].grid[0] * got[0].grid[1]
        got, expected = got[1], expected[1]
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)


@every_kind
def test_deterministic_calls_agree_and_need_no_key(kind):
    reducer = solve(kind, 16, (8, 8))
    shown = tuple(side // PATCH for side in reducer.image_size(8 * PATCH, 8 * PATCH, (8, 8)))
    first, second = (reduce(reducer, numbered(shown)) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)


@every_kind
def test_a_reducer_has_no_parameters(kind):
    reducer = solve(kind, 16, (8, 8))
    shown = tuple(side // PATCH for side in reducer.image_size(8 * PATCH, 8 * PATCH, (8, 8)))
    variables = jax.eval_shape(lambda f: reducer.init(jax.random.key(0), f, deterministic=True), numbered(shown))
    assert not jax.tree.leaves(variables)
