"""Gated DeltaNet: chunks, steps and one token after another agree; segments, branches, padding and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.attention import Context
from vlm_jax.layers.delta_rule import CHUNK, Lineages, chunked, inverted, step
from vlm_jax.layers.gated_delta import GatedDelta
from vlm_jax.sharding.rules import use_mesh

from ..advice import tried
from ..parameters import drawn

BATCH, KEY_HEADS, HEADS, KEY, VALUE, WIDTH = 2, 2, 4, 6, 5, 8


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(BATCH, length, *shape)).astype(np.float32)

    query, key = normal(KEY_HEADS, KEY), normal(KEY_HEADS, KEY)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate = rng.uniform(size=(BATCH, length, HEADS)).astype(np.float32)
    return query, key, normal(HEADS, VALUE), rate, -np.abs(normal(HEADS))


def one_by_one(query, key, value, rate, decay, memory):
    """The rule as it is written, in float64."""
    query, key = (np.repeat(x, HEADS // KEY_HEADS, axis=2).astype(np.float64) for x in (query, key))
    memory, out = np.array(memory, np.float64), []
    for t in range(key.shape[1]):
        memory = memory * np.exp(decay[:, t])[..., None, None]
        found = np.einsum("bhk,bhkv->bhv", key[:, t], memory)
        change = rate[:, t, :, None] * (value[:, t] - found)
        memory = memory + np.einsum("bhk,bhv->bhkv", key[:, t], change)
        out.append(np.einsum("bhk,bhkv->bhv", query[:, t], memory))
    return np.stack(out, axis=1), memory


def one_segment(length, held=1):
    return Lineages.of(jnp.ones((BATCH, length), jnp.int32), jnp.full(BATCH, held, jnp.int32))


@pytest.mark.parametrize("length", [1, 2, 5, CHUNK, 2 * CHUNK + 3])
def test_chunks_are_one_token_after_another(length):
    given, memory = inputs(length), np.repeat(inputs(1)[2][:, 0, :, None], KEY, axis=2)
    out, after = jax.jit(chunked)(*given, memory, one_segment(length))
    expected, at_end = one_by_one(*given, memory)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(after, at_end, atol=2e-5)


def test_steps_are_chunks():
    given, memory = inputs(3), jnp.zeros((BATCH, HEADS, KEY, VALUE))
    expected, at_end = chunked(*given, None, one_segment(3))
    out = []
    for t in range(3):
        query, key, value, rate, decay = (jnp.asarray(x[:, t : t + 1]) for x in given)
        found, memory = step(query, key, value, rate, decay, memory, one_segment(1))
        out.append(found)
    np.testing.assert_allclose(np.concatenate(out, axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(memory, at_end, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_inverse_is_exact_where_all_keys_are_equal(size):
    """Powers of this matrix have entries of 1e18, so a sum of them would not be the inverse."""
    lower = np.tril(np.ones((size, size), np.float32), -1)
    np.testing.assert_allclose(inverted(jnp.asarray(lower)), np.linalg.inv(np.eye(size) + lower), atol=1e-6)


@functools.cache
def layer(**fields):
    module = GatedDelta(KEY_HEADS, HEADS, KEY, VALUE, **fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)), Context("causal"))
    return module, nn.meta.unbox(drawn(shapes))


@functools.cache
def compiled(cached):
    module, params = layer()

    def run(x, segments, branches, cache):
        context = Context("causal", segments, segments, branches)
        return module.apply(params, x, context, cache=cache)

    return jax.jit(run) if cached else jax.jit(lambda x, segments, branches=None: run(x, segments, branches, None)[0])


def mixed(x, segments=None, branches=None):
    segments = np.ones(x.shape[:2]) if segments is None else segments
    branches = None if branches is None else jnp.asarray(branches, jnp.int32)
    return np.asarray(compiled(cached=False)(x, jnp.asarray(segments, jnp.int32), branches))


def row(length, seed=1):
    return np.random.default_rng(seed).normal(size=(1, length, WIDTH)).astype(np.float32)


def empty():
    module, _ = layer()
    return jax.tree.map(lambda leaf: leaf[0], module.empty(1, 1, jnp.float32))


@pytest.mark.parametrize("lengths", [(3, 5), (70, 1, 69), (64, 64), (2, 140)])
def test_packed_rows_are_their_segments(lengths):
    x, ends = row(sum(lengths)), np.cumsum(lengths)
    packed = mixed(x, np.repeat(np.arange(len(lengths)) + 1, lengths)[None])
    for start, end in zip(ends - lengths, ends, strict=True):
        np.testing.assert_allclose(packed[:, start:end], mixed(x[:, start:end]), atol=1e-5)


def test_padding_anywhere_is_not_read():
    x = row(150)
    real = np.random.default_rng(0).uniform(size=150) < 0.6
    out = mixed(x, real[None].astype(int))
    np.testing.assert_allclose(out[:, real], mixed(x[:, real]), atol=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "branches",
    [
        [0] * 4 + [1] * 3 + [2] * 5 + [3],
        [0] * 50 + [1] * 40 + [2] * 60 + [3] * 4,
        [0] * 3 + [1] * 70 + [2] * 80 + [3] * 60,
    ],
)
def test_a_branch_is_the_shared_tokens_and_its_own(branches):
    branches = np.array(branches)
    x = row(2 + len(branches))
    segments, ids = np.array([[1] * 2 + [2] * len(branches)]), np.array([[0, 0, *branches]])
    together, x = mixed(x, segments, ids)[:, 2:], x[:, 2:]
    for branch in range(branches.max() + 1):
        seen = (branches == 0) | (branches == branch)
        own = branches[seen] == branch
        np.testing.assert_allclose(together[:, branches == branch], mixed(x[:, seen])[:, own], atol=1e-5)


@pytest.mark.parametrize("pieces", [(4, 1, 1, 2), (70, 66, 1), (1, 1, 1, 1, 1)])
def test_a_cache_goes_on_wherever_a_row_is_cut(pieces):
    """Pieces are padded on either side, between their tokens, or whole."""
    x, cache, out, start = row(sum(pieces)), empty(), [], 0
    for number, length in enumerate(pieces):
        piece, segments = x[:, start : start + length], np.ones((1, length), np.int32)
        if length > 1:
            at = (0, length, 1)[number % 3]
            piece, segments = (np.insert(y, [at, at], 7 * (y.ndim - 2), axis=1) for y in (piece, segments))
        found, cache = compiled(cached=True)(piece, jnp.asarray(segments), None, cache)
        out.append(np.asarray(found)[:, segments[0] == 1])
        _, same = compiled(cached=True)(piece[:, :1], jnp.zeros((1, 1), jnp.int32), None, cache)
        jax.tree.map(np.testing.assert_array_equal, same, cache)
        start += length
    np.testing.assert_allclose(np.concatenate(out, axis=1), mixed(x), atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_new_segment_after_a_cache_starts_anew(length):
    """Also with the token after it, which reads only the new segment."""
    x = row(6 + length)
    _, cache = compiled(cached=True)(x[:, :5], jnp.full((1, 5), 1), None, empty())
    found, cache = compiled(cached=True)(x[:, 5:-1], jnp.full((1, length), 2), None, cache)
    after, _ = compiled(cached=True)(x[:, -1:], jnp.full((1, 1), 2), None, cache)
    np.testing.assert_allclose(np.concatenate([found, after], axis=1), mixed(x[:, 5:]), atol=1e-5)


def test_errors_name_the_mechanism():
    module, params = layer()
    with pytest.raises(ValueError, match="2 heads of keys do not divide 3 of values"):
        jax.eval_shape(module.clone(num_value_heads=3).apply, params, row(2), Context("causal"))
    names, advice = (
        ("data", "fsdp", "tensor", "context", "expert"),
        tried("got {}; use the devices for another axis"),
    )
    with use_mesh(jax.make_mesh((1, 1, 1, 2, 1), names)), pytest.raises(ValueError, match=advice):
        jax.eval_shape(module.apply, params, row(2), Context("causal"))
    with use_mesh(jax.make_mesh((1, 1, 2, 1, 1), names)):
        jax.eval_shape(module.apply, params, row(2), Context("causal"))
