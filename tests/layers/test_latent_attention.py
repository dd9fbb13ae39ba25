"""Latent attention against NumPy, with its two orders of products, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.layers.attention import Context
from vlm_jax.layers.latent_attention import LatentAttention, LatentKeyValue
from vlm_jax.layers.rope import Rope

from ..parameters import drawn

BATCH, LENGTH, WIDTH, HEADS = 2, 7, 10, 3
SIZES = {"num_heads": HEADS, "latent_dim": 8, "content_dim": 6, "rope_dim": 4, "value_dim": 5}
VARIANTS = {
    "plain queries": {"query_latent_dim": None},
    "query latent, biases": {"query_latent_dim": 9, "use_bias": True, "logit_scale": 1.3},
}
THETA = 100.0


def rms(x, params):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]


def dense(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def turned(x, positions):
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[..., None] * THETA ** (-np.arange(half) / half))
    out = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([out.real, out.imag], axis=-1)


def expected(reference, x, p, variant):
    """Keys and values of every head in full."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    positions = np.arange(LENGTH)
    query = rms(dense(x, p["query_latent"]), p["query_latent_norm"]) if variant["query_latent_dim"] else x
    query = dense(query, p["query"]).reshape(BATCH, LENGTH, HEADS, 10)
    query = np.concatenate([query[..., :6], turned(query[..., 6:], positions[:, None])], axis=-1)
    latent = rms(dense(x, p["latent"]), p["latent_norm"])
    shared = turned(dense(x, p["rope_key"]), positions)[:, :, None].repeat(HEADS, axis=2)
    key = np.concatenate([(latent @ p["key_expansion"]).reshape(BATCH, LENGTH, HEADS, 6), shared], axis=-1)
    value = (latent @ p["value_expansion"]).reshape(BATCH, LENGTH, HEADS, 5)
    mask = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(BATCH, axis=0)
    out = reference.attention(query, key, value, mask, scale=variant.get("logit_scale", 1.0) * 10**-0.5)
    return dense(out.reshape(BATCH, LENGTH, -1), p["out"])


@functools.cache
def made(variant):
    module = LatentAttention(**SIZES, **VARIANTS[variant])
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    init = functools.partial(module.init, context=Context("causal"))
    return module, nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), x))), x


def angles(start=0, stop=LENGTH):
    positions = jnp.tile(jnp.arange(start, stop)[None], (BATCH, 1))
    return Rope(THETA).angles(positions, SIZES["rope_dim"])


def absorbing(module, absorbs):
    class Forced(LatentAttention):
        def _absorbs(self, num_queries, num_keys):
            return absorbs

    return Forced(**{name: getattr(module, name) for name in (*SIZES, "query_latent_dim", "logit_scale", "use_bias")})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("absorbs", [False, True])
def test_both_orders_of_products_are_the_definition(reference, variant, absorbs):
    module, variables, x = made(variant)
    context = Context("causal", angles=angles())
    got, _ = absorbing(module, absorbs).apply(variables, jnp.asarray(x), context)
    np.testing.assert_allclose(got, expected(reference, x, variables["params"], VARIANTS[variant]), atol=2e-5)


@pytest.mark.parametrize("absorbs", [False, True])
def test_step_by_step_from_a_cache_of_latents(reference, absorbs):
    variant = "query latent, biases"
    module, variables, x = made(variant)
    cache = LatentKeyValue(jnp.zeros((BATCH, 0, 8)), jnp.zeros((BATCH, 0, 4)))
    whole = expected(reference, x, variables["params"], VARIANTS[variant])
    run = jax.jit(absorbing(module, absorbs).apply)
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, LENGTH))]:
        got, new = run(variables, x[:, start:stop], Context("causal", angles=angles(start, stop)), cache=cache)
        cache = LatentKeyValue(*(jnp.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True)))
        np.testing.assert_allclose(got, whole[:, start:stop], atol=2e-5)


def test_the_cheaper_order_is_taken():
    """At the sizes of DeepSeek-VL2: a prompt expands, a step over a cache of any length absorbs."""
    sizes = {"num_heads": 16, "latent_dim": 512, "content_dim": 128, "rope_dim": 64, "value_dim": 128}
    module = LatentAttention(**sizes, query_latent_dim=None)

    def flops(absorbs, num_queries, num_keys):
        forced = module if absorbs is None else absorbing(module, absorbs)
        x = jax.ShapeDtypeStruct((1, num_queries, 32), jnp.float32)
        shapes = nn.meta.unbox(
            jax.eval_shape(functools.partial(module.init, context=Context("full")), jax.random.key(0), x)
        )
        rows = (jax.ShapeDtypeStruct((1, num_keys - num_queries, size), jnp.float32) for size in (512, 64))

        def run(variables, x, cache):
            return forced.apply(variables, x, Context("causal"), cache=cache)

        return count_flops(run, shapes, x, LatentKeyValue(*rows))

    for num_queries, num_keys, best in ((1, 64, True), (1, 4096, True), (512, 512, False), (512, 2048, False)):
        assert flops(None, num_queries, num_keys) == flops(best, num_queries, num_keys)
        assert flops(best, num_queries, num_keys) < flops(not best, num_queries, num_keys)
