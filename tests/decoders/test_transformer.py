"""The decoder of the Llama and Gemma families against NumPy, from ids to logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.decoders.transformer import Transformer
from vlm_jax.layers.attention import Context
from vlm_jax.layers.rope import Rope

from ..advice import tried
from ..parameters import drawn

VOCAB, WIDTH, LENGTH, DEPTH = 11, 12, 5, 2


def rms_norm(x, params, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * params["scale"]


def rotate(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(x, params, heads, kv_heads, theta):
    q, k, v = (
        (x @ params[name]["kernel"]).reshape(LENGTH, count, -1)
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    )
    q, k = rotate(q, theta), rotate(k, theta)
    out = np.zeros_like(q)
    for t, h in np.ndindex(LENGTH, heads):
        kv = h * kv_heads // heads
        weights = np.exp(k[: t + 1, kv] @ q[t, h] / np.sqrt(q.shape[-1]))
        out[t, h] = weights @ v[: t + 1, kv] / weights.sum()
    return out.reshape(LENGTH, -1) @ params["out"]["kernel"]


def written_out(ids, params, decoder):
    x = params["embedding"]["embedding"][ids]
    for i in range(DEPTH):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]["layers"])
        normed = rms_norm(x, p["attention_norm"])
        x = x + attend(normed, p["attention"], decoder.num_heads, decoder.num_kv_heads, decoder.rope.theta)
        normed = rms_norm(x, p["mlp_norm"])
        gate, up = (normed @ p["mlp"][name]["kernel"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"]
    x = rms_norm(x, params["final_norm"])
    return x @ (params["embedding"]["embedding"].T if decoder.tie_embeddings else params["head"]["kernel"])


def logits_of(decoder, ids):
    hidden, _ = decoder(decoder.embed(ids), jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32))
    return decoder.logits(hidden)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_heads": 3, "num_kv_heads": 3, "tie_embeddings": True},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "tie_embeddings": False, "rope": Rope(50.0)},
    ],
)
def test_logits_are_those_written_out(fields):
    decoder = Transformer(VOCAB, WIDTH, depth=DEPTH, mlp_dim=16, **fields)
    ids = np.random.default_rng(0).integers(0, VOCAB, size=(1, LENGTH))
    init = functools.partial(decoder.init, method=logits_of)
    params = nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), jnp.asarray(ids))))
    got = jax.jit(lambda p: decoder.apply(p, jnp.asarray(ids), method=logits_of))(params)
    expected = written_out(ids[0], jax.tree.map(np.float64, params["params"]), decoder)
    np.testing.assert_allclose(got[0], expected, atol=5e-5)
    names = {"embedding", "blocks", "final_norm", *([] if decoder.tie_embeddings else ["head"])}
    assert set(params["params"]) == names


def test_logits_of_a_fresh_model_are_of_the_order_of_one():
    """A tied table that is drawn too wide would start training from a huge loss."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 500, size=(1, LENGTH)))
    for tied in (True, False):
        decoder = Transformer(500, 64, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=32, tie_embeddings=tied)
        logits, _ = jax.jit(lambda key, d=decoder: d.init_with_output(key, ids, method=logits_of))(jax.random.key(0))
        assert 0.5 < float(jnp.std(logits)) < 2.0


def test_queries_beyond_a_length_are_scaled_by_a_logarithm():
    """Against the same queries scaled through their projection, one position at a time."""
    plain = Transformer(VOCAB, WIDTH, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=16, rope=Rope(50.0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(1, LENGTH)))
    params = nn.meta.unbox(
        drawn(jax.eval_shape(functools.partial(plain.init, method=logits_of), jax.random.key(0), ids))
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(decoder, scale):
        def scaled(path, leaf):
            return leaf * scale if jax.tree_util.keystr(path).endswith("['query']['kernel']") else leaf

        return decoder.apply(jax.tree_util.tree_map_with_path(scaled, params), ids, method=logits_of)[0]

    got = run(plain.clone(log_length=3), 1.0)
    for place in range(LENGTH):
        factor = max(1.0, np.log(place + 1) / np.log(3))
        np.testing.assert_allclose(got[place], run(plain, factor)[place], atol=1e-5)
    assert np.abs(got[3:] - run(plain, 1.0)[3:]).max() > 1e-3


def test_numbers_of_experts_without_experts_are_refused():
    decoder = Transformer(VOCAB, WIDTH, DEPTH, 2, 1, 8, num_experts=4)
    run = functools.partial(nn.init(logits_of, decoder), jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    with pytest.raises(ValueError, match=tried("not read without experts; set expert_dim")):
        jax.eval_shape(run)
    shapes = jax.eval_shape(functools.partial(nn.init(logits_of, decoder.clone(expert_dim=6)), *run.args))
    kernel = nn.meta.unbox(shapes)["params"]["blocks"]["layers"]["mlp"]["experts"]["gate"]
    assert kernel.shape == (DEPTH, 4, WIDTH, 6)


LOCAL = Transformer(
    VOCAB,
    WIDTH,
    DEPTH,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=8,
    activation="gelu_tanh",
    rope=Rope(100.0, "linear", factor=2.0),
    local_rope=Rope(10.0),
    norm="rms_from_one",
    post_norm=True,
    qk_norm=True,
    qk_scale=0.7,
    embedding_scale=3.0,
    windows=(2, None),
)


def local_written_out(ids, params):
    """Of `LOCAL`: a local block, and a global one with stretched positions."""

    def norm(x, p):
        return rms_norm(x, {"scale": 1 + p["scale"]})

    x = 3.0 * params["embedding"]["embedding"][ids]
    for i, (window, theta, factor) in enumerate(((2, 10.0, 1.0), (LENGTH, 100.0, 2.0))):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]["layers"])
        normed, own = norm(x, p["attention_norm"]), p["attention"]
        q, k, v = ((normed @ own[name]["kernel"]).reshape(LENGTH, -1, 6) for name in ("query", "key", "value"))
        q, k = norm(q, own["query_norm"]), norm(k, own["key_norm"])
        turns = np.exp(1j * np.arange(LENGTH)[:, None, None] / factor * theta ** (-np.arange(3) / 3))
        q, k = ((y[..., :3] + 1j * y[..., 3:]) * turns for y in (q, k))  # products are their real parts
        out = np.zeros((LENGTH, 2, 6))
        for t, h in np.ndindex(LENGTH, 2):
            seen = slice(max(t - window + 1, 0), t + 1)
            weights = np.exp(0.7 * (k[seen, 0] @ q[t, h].conj()).real)
            out[t, h] = weights @ v[seen, 0] / weights.sum()
        x = x + norm(out.reshape(LENGTH, -1) @ own["out"]["kernel"], p["attention_post_norm"])
        gate, up = (norm(x, p["mlp_norm"]) @ p["mlp"][name]["kernel"] for name in ("gate", "up"))
        gelu = gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gelu * up) @ p["mlp"]["down"]["kernel"], p["mlp_post_norm"])
    return norm(x, params["final_norm"]) @ params["embedding"]["embedding"].T


def test_local_and_global_blocks_in_one_stack():
    """Each with its own window and rotary angles; also block by block, as where tokens are dropped between them."""
    ids = jnp.asarray([[3, 1, 4, 1, 5]])
    init = functools.partial(LOCAL.init, method=logits_of)
    params = nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), ids)))
    expected = local_written_out(np.asarray(ids[0]), jax.tree.map(np.float64, params["params"]))
    got = jax.jit(functools.partial(LOCAL.apply, method=logits_of))(params, ids)
    np.testing.assert_allclose(got[0], expected, atol=2e-4 * np.abs(expected).max())

    def by_block(decoder):
        positions, segments = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
        angles = decoder._angles(positions, None)
        context = Context("causal", segments, segments, angles=angles)
        x, _ = decoder.blocks.run(decoder.embed(ids), context, 0, 1)
        x, _, _ = decoder.blocks.attend(x, context, 1)
        return decoder.logits(decoder.final_norm(decoder.blocks.feed_forward(x, 1)))

    np.testing.assert_allclose(LOCAL.apply(params, method=by_block), got, atol=1e-5)


def test_a_local_rope_without_a_local_block_is_refused():
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    for wrong, told in (
        (LOCAL.clone(windows=()), tried("none has one; set windows, or only rope")),
        (LOCAL.clone(rope=Rope(scaling="yarn", factor=4.0, original_length=8)), "local_rope: expected the attention"),
    ):
        with pytest.raises(ValueError, match=told):
            jax.eval_shape(nn.init(logits_of, wrong), jax.random.key(0), ids)
    for right in (LOCAL, LOCAL.clone(windows=(), local_rope=None)):
        jax.eval_shape(nn.init(logits_of, right), jax.random.key(0), ids)
