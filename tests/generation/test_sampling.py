"""Filters of logits against their definitions in NumPy, token by token."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.generation.released import _sampled
from vlm_jax.generation.sampling import GenerationError, Sampling, filtered, penalised, row_values, sample_tokens

from ..advice import tried

LOGITS = np.random.default_rng(1).normal(size=(4, 23)).astype(np.float32) * 2


def by_definition(logits, top_k, top_p):
    """The k most likely tokens; of these the fewest whose probabilities reach top_p."""
    out = np.full_like(logits, -np.inf)
    for row, values in enumerate(logits):
        order = np.argsort(-values)[: top_k or None]
        weights = np.exp(values[order] - values.max())
        reached = np.cumsum(weights / weights.sum())
        count = len(order) if top_p is None else 1 + np.count_nonzero(reached[:-1] < top_p)
        out[row, order[:count]] = values[order[:count]]
    return out


@pytest.mark.parametrize("top_k", [None, 1, 4, 23, 100])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.01, 0.5, 0.9, 0.999])
def test_top_k_and_top_p(top_k, top_p):
    k, p = None if top_k is None else np.int32(top_k), None if top_p is None else np.float32(top_p)
    np.testing.assert_array_equal(filtered(jnp.asarray(LOGITS), k, p), by_definition(LOGITS, top_k, top_p))


def test_rows_with_limits_of_their_own():
    top_k, top_p = [1, 4, 23, 7], [0.5, 0.9, 0.01, 0.999]
    rows = [by_definition(LOGITS[n : n + 1], top_k[n], top_p[n]) for n in range(4)]
    found = filtered(jnp.asarray(LOGITS), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32))
    np.testing.assert_array_equal(found, np.concatenate(rows))
    assert not np.array_equal(found, filtered(jnp.asarray(LOGITS), np.int32(7), np.float32(0.999)))


def test_rows_with_settings_of_their_own_draw_as_alone():
    """Temperatures, seeds and penalties of rows; the last setting is also that of rows that fill a mesh."""
    rows = [
        Sampling(0.7, 5, 0.9, 1.5, seed=3),
        Sampling(1.5, 9, 0.8, 1.1, seed=9),
        Sampling(3.0, 20, 0.99, 2.0, seed=4),
    ]
    seen, logits = jnp.asarray(LOGITS > 1), jnp.asarray(LOGITS)
    values, told = row_values(rows, 4), set()
    assert values["temperature"].tolist() == np.float32([0.7, 1.5, 3.0, 3.0]).tolist()
    for step in range(12):
        place = jnp.asarray(step)
        together = sample_tokens(logits, values, seen, jnp.arange(4), place).tolist()
        for row, sampling in enumerate([*rows, rows[-1]]):
            one = slice(row, row + 1)
            alone = sample_tokens(logits[one], sampling.values(), seen[one], jnp.asarray([row]), place)
            assert together[row] == int(alone[0])
        told.add(tuple(together))
    assert len(told) > 6


def test_rows_of_a_batch_use_the_same_settings():
    greedy, drawn = Sampling(), Sampling(temperature=1.0)
    fix = tried(
        "sampling: row 0 uses {no settings}, row {1} {}; put rows that use other settings into a separate batch"
    )
    with pytest.raises(GenerationError, match=fix):
        row_values([greedy, drawn], 2)
    assert row_values([greedy, greedy], 2) == {}
    assert row_values([drawn, drawn], 2)["seed"].tolist() == [0, 0]


def test_what_ties_with_the_last_of_top_k_stays():
    logits = jnp.asarray([[3.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(filtered(logits, np.int32(2), None)).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.3, 2), (0.8, 4), (0.99, 5)])
def test_of_ties_top_p_keeps_as_many_as_it_needs(top_p, kept):
    """Four tokens of a quarter each, but for what the last one takes of them."""
    logits = jnp.asarray([[1.0, 1.0, 1.0, 1.0, -2.0]])
    assert np.isfinite(filtered(logits, None, np.float32(top_p))).sum() == kept


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-60])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2**40}, {"top_p": 0.9}])
def test_the_coldest_draw_is_of_the_most_likely_token(temperature, settings):
    values = Sampling(temperature=temperature, **settings).values()
    logits = jnp.asarray([[-5.0, -4.0, -3.0], [0.0, 9.0, 2.0]])
    assert sample_tokens(logits, values, None, jnp.arange(2), jnp.asarray(0)).tolist() == [2, 1]


def test_logits_that_are_minus_infinity_are_never_drawn():
    logits = jnp.asarray([[1.0, -np.inf, 0.5, -np.inf]])
    assert np.isfinite(filtered(logits, np.int32(3), np.float32(0.99999))).tolist() == [[True, False, True, False]]


def test_the_penalty_lowers_whatever_the_sign():
    seen = LOGITS > 1.0
    seen[:, ::3] = True
    expected = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5), LOGITS)
    np.testing.assert_allclose(penalised(jnp.asarray(LOGITS), jnp.asarray(seen), np.float32(1.5)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected 1 or more, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: expected more than 0 and at most 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected more than 0, got 0.0"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p: expected more than 0 and at most 1, got nan"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: expected more than 0, got nan"),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
        ({"temperature": None}, "temperature: expected a number, got None"),
        ({"temperature": True}, "temperature: expected a number, got True"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: expected a whole number or None, got 2.5"),
        ({"temperature": 1.0, "top_k": True}, "top_k: expected a whole number or None, got True"),
        ({"temperature": 1.0, "top_p": "0.5"}, "top_p: expected a number or None, got '0.5'"),
        ({"temperature": 1.0, "top_p": np.True_}, "top_p: expected a number or None, got .*True"),
        ({"repetition_penalty": [1.5]}, r"repetition_penalty: expected a number, got \[1.5\]"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"seed": False, "top_k": 1.0}, "top_k: .* got 1.0\nseed: expected a whole number, got False"),
        ({"top_p": 0.5}, "top_p: is unused at temperature 0"),
    ],
)
def test_settings_outside_their_range_are_named(settings, message):
    made = inspect.unwrap(Sampling.__init__)  # without the checks of types, which are before it in tests
    with pytest.raises(GenerationError, match=message):
        made(object.__new__(Sampling), **settings)


@pytest.mark.parametrize("extreme", [1e-50, 1e39])
def test_settings_beyond_float32_are_its_nearest(extreme):
    given = Sampling(temperature=extreme, repetition_penalty=extreme).values()
    limits = np.finfo(np.float32)
    nearest = limits.tiny if extreme < 1 else limits.max
    assert given["temperature"] == given["repetition_penalty"] == nearest


def test_numbers_of_numpy_are_numbers():
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.25), np.float16(2), np.uint32(7))
    assert given.values() == Sampling(0.5, 3, 0.25, 2, 7).values()
    assert len(given.values()) == 5


def test_limits_of_sampling_need_a_temperature():
    with pytest.raises(GenerationError, match=tried("{top_k}: is unused at temperature 0; set a temperature above 0")):
        Sampling(temperature=0, top_k=3)
    assert Sampling(temperature=0.5, top_k=3).top_k == 3


def test_the_sampling_of_a_release_is_that_of_the_call_in_its_note():
    (told,) = _sampled({"do_sample": True, "top_k": 5, "temperature": 0.5})
    assert re.search(
        tried("answers here are greedy by default, pass sampling=Sampling({temperature=0.5, top_k=5})"), told
    )
    assert Sampling(temperature=0.5, top_k=5).temperature == 0.5
