"""Stacks of layers of several kinds, and what of their order is scanned."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoders.dropping import Rows
from vlm_jax.decoders.mixed import MixedTransformer
from vlm_jax.decoders.periods import periods, stacks_of

from ..contracts.kinds import small


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", {"a_0": [0, 1, 2, 3]}),
        ("aab", {"a_0": [0, 1], "b_2": [2]}),
        ("aabaab", {"a_0_every_3": [0, 3], "a_1_every_3": [1, 4], "b_2_every_3": [2, 5]}),
        ("abababaa", {"a_0_every_2": [0, 2, 4], "b_1_every_2": [1, 3, 5], "a_6": [6, 7]}),
        ("caba", {"c_0": [0], "a_1": [1], "b_2": [2], "a_3": [3]}),
    ],
)
def test_stacks(kinds, expected):
    assert {name: list(layers) for name, layers in stacks_of(kinds)} == expected


def test_consecutive_layers_alone():
    found = {name: list(layers) for name, layers in stacks_of("aabaab", interleaved=False)}
    assert found == {"a_0": [0, 1], "b_2": [2], "a_3": [3, 4], "b_5": [5]}


@pytest.mark.parametrize("length", range(1, 9))
def test_no_other_division_compiles_less(length):
    """Against all divisions into parts that repeat, of every order of two kinds."""

    def cheapest(order):
        if not order:
            return 0
        costs = []
        for period, repeats in itertools.product(range(1, len(order) + 1), repeat=2):
            size = period * repeats
            repeated = order[:period] * repeats == order[:size] and size <= len(order)
            if repeated and (period == 1 or repeats > 1):
                costs.append(period + cheapest(order[size:]))
        return min(costs)

    for order in itertools.product("ab", repeat=length):
        found = periods(order)
        assert sum(period for _, period, _ in found) == cheapest(order)
        spelled = [order[first : first + period] * repeats for first, period, repeats in found]
        assert tuple(itertools.chain(*spelled)) == order


def scans(jaxpr):
    """(steps, equations inside) of the scans of a program, outermost ones."""
    return [
        (int(eqn.params["length"]), len(eqn.params["jaxpr"].jaxpr.eqns))
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "scan"
    ]


def test_periods_are_one_loop_whatever_their_number():
    """Its body, of three blocks, does not grow with the depth; the last block is by itself."""

    def program(repeats):
        order = (0, 0, 1) * repeats + (0,)
        decoder = small(MixedTransformer, order=order, depth=len(order))

        def run(decoder, tokens):
            return decoder(decoder.embed(tokens), tokens, jnp.ones_like(tokens))[0]

        tokens = jnp.zeros((1, 4), jnp.int32)
        shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), tokens, method=run))
        return scans(jax.make_jaxpr(lambda params: decoder.apply(params, tokens, method=run))(shapes).jaxpr)

    short, long = program(2), program(5)
    assert [length for length, _ in short] == [2, 1] and [length for length, _ in long] == [5, 1]
    assert [size for _, size in short] == [size for _, size in long]


def test_one_block_after_another():
    """A prompt and its next tokens through seven layers, against the same blocks one by one."""
    order = (0, 0, 1, 0, 0, 1, 0)
    decoder = small(MixedTransformer, order=order, depth=len(order))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 6)))
    positions, ones = jnp.broadcast_to(jnp.arange(6), (2, 6)), jnp.ones_like(tokens)

    def run(decoder, cut=6):
        if cut == 6:
            return decoder(decoder.embed(tokens), positions, ones)[0]
        cache, found = decoder.init_cache(2, 6), []
        for first, last in ((0, cut), *((i, i + 1) for i in range(cut, 6))):
            part = slice(first, last)
            out, cache = decoder(decoder.embed(tokens[:, part]), positions[:, part], ones[:, part], cache)
            found.append(out)
        return jnp.concatenate(found, axis=1)

    def by_itself(decoder):
        x = decoder.embed(tokens)
        angles = decoder._angles(positions, None)
        for layer in range(len(order)):
            name, index = next((name, layers.index(layer)) for name, layers in decoder.stacks() if layer in layers)
            rows = Rows(x, positions, None, angles, None, ones, None, positions)
            x, _ = getattr(decoder, name).run(x, decoder.context_in(name, decoder.context(rows)), index, index + 1)
        return decoder.final_norm(x)

    params = decoder.init(jax.random.key(1), method=run)
    expected = decoder.apply(params, method=by_itself)
    np.testing.assert_allclose(decoder.apply(params, method=run), expected, atol=1e-5)
    np.testing.assert_allclose(decoder.apply(params, 4, method=run), expected, atol=1e-5)
