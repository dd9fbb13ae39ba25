"""Attention against softmax written out, query by query."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers import attention as module
from vlm_jax.layers.attention import Context, KeyValue, MultiHeadAttention, choose_implementation, entry, xla

from ...advice import tried
from ...parameters import drawn

attention = jax.jit(module.attention, static_argnames=("scale", "implementation"))

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
BRANCHES = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0]])


def arrays(batch=2, queries=6, keys=6, heads=4, kv_heads=2, dim=8, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def readable(batch, queries, keys, *, causal=False, offset=0, query_segments=None, key_segments=None, branches=None):
    """Position by position, which key a query reads."""
    mask = np.ones((batch, queries, keys), bool)
    for b, t, s in np.ndindex(mask.shape):
        if causal and s > t + offset:
            mask[b, t, s] = False
        if query_segments is not None and query_segments[b, t] != key_segments[b, s]:
            mask[b, t, s] = False
        if branches is not None and branches[b, s] not in (0, branches[b, t]):
            mask[b, t, s] = False
    return mask


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(reference, kv_heads):
    q, k, v = arrays(kv_heads=kv_heads, keys=5)
    np.testing.assert_allclose(attention(q, k, v, Context("full")), reference.attention(q, k, v), atol=1e-5)


def test_scale_and_bias(reference):
    q, k, v = arrays()
    bias = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    out = attention(q, k, v, Context("full"), scale=0.3, bias=jnp.asarray(bias))
    np.testing.assert_allclose(out, reference.attention(q, k, v, scale=0.3, bias=bias), atol=1e-5)


@pytest.fixture(params=["xla", "blocked", "blocked together"])
def in_blocks(request, monkeypatch):
    """Names an implementation; the blocked one takes two queries at a time, of one key head or of both."""
    monkeypatch.setattr(xla, "BLOCK_BYTES", 4 * 2 * 2 * 7)
    monkeypatch.setattr(xla, "TOGETHER_BYTES", 4 * 2 * 2 * 7 * (2 if "together" in request.param else 1))
    return request.param.split()[0]


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("branched", [False, True])
def test_masks(reference, in_blocks, kind, segmented, branched):
    q, k, v = arrays()
    segments = jnp.asarray(SEGMENTS) if segmented else None
    context = Context(kind, segments, segments, jnp.asarray(BRANCHES) if branched else None)
    mask = readable(
        2, 6, 6,
        causal=kind == "causal",
        query_segments=SEGMENTS if segmented else None,
        key_segments=SEGMENTS if segmented else None,
        branches=BRANCHES if branched else None,
    )  # fmt: skip
    out = jax.jit(lambda *qkv: module.attention(*qkv, context, implementation=in_blocks))(q, k, v)
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_blocks_of_uneven_lengths_and_values_of_their_own_width(reference, in_blocks, kind):
    q, k, v = arrays(queries=5, keys=7)
    v = jnp.concatenate([v, v[..., :1]], axis=-1)[..., 4:]
    out = jax.jit(lambda *qkv: module.attention(*qkv, Context(kind), implementation=in_blocks))(q, k, v)
    mask = readable(2, 5, 7, causal=kind == "causal", offset=2)
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


def test_blocks_have_the_gradients_of_the_whole(in_blocks):
    q, k, v = arrays()
    context = Context("causal", jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))

    def grads(implementation):
        def loss(qkv):
            out = module.attention(*qkv, context, implementation=implementation)
            return jnp.sum(jnp.sin(out) * (SEGMENTS != 0)[..., None, None])

        return jax.jit(jax.grad(loss))([q, k, v])

    for name, got, expected in zip("qkv", grads(in_blocks), grads("xla"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


def test_causal_queries_are_the_last_of_longer_keys(reference):
    q, k, v = arrays(queries=3, keys=8)
    key_segments = np.array([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    query_segments = np.ones((2, 3), int)
    given = [jnp.asarray(x) for x in (query_segments, key_segments)]
    out = attention(q, k, v, Context("causal", *given))
    mask = readable(
        2, 3, 8, causal=True, offset=5, query_segments=query_segments, key_segments=key_segments
    )  # fmt: skip
    expected, meaningful = reference.attention(q, k, v, mask), mask.any(-1)
    np.testing.assert_allclose(np.asarray(out)[meaningful], expected[meaningful], atol=1e-5)
    assert np.isfinite(out).all()


def last_of(mask, window):
    """Of the keys that each query reads, the last so many."""
    return mask & (np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] <= window)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("branched", [False, True])
def test_a_window_leaves_the_last_keys(reference, in_blocks, window, segmented, branched):
    q, k, v = arrays()
    segments = jnp.asarray(SEGMENTS) if segmented else None
    branches = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2]])  # a branch follows what all read
    context = Context(
        "causal", segments, segments, jnp.asarray(branches) if branched else None, window=jnp.asarray(window)
    )
    of_segments = {"query_segments": SEGMENTS, "key_segments": SEGMENTS} if segmented else {}
    mask = readable(2, 6, 6, causal=True, branches=branches if branched else None, **of_segments)
    expected = reference.attention(q, k, v, last_of(mask, window))
    out = jax.jit(lambda *qkv: module.attention(*qkv, context, implementation=in_blocks))(q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_positions_of_a_group_read_each_other(reference, in_blocks):
    q, k, v = arrays()
    segments, groups = jnp.asarray(SEGMENTS), np.array([[1, 1, 0, 2, 2, 0], [0, 0, 5, 5, 6, 6]])
    context = Context("causal", segments, segments, groups=jnp.asarray(groups))
    mask = readable(2, 6, 6, causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS)
    for row, start in ((0, 0), (0, 3), (1, 2), (1, 4)):
        mask[row, start, start + 1] = True
    out = jax.jit(lambda *qkv: module.attention(*qkv, context, implementation=in_blocks))(q, k, v)
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("exceeds", [False, True])
def test_a_group_is_longer_than_a_window(reference, in_blocks, exceeds):
    """As in the masks of transformers.

    In PaliGemma 2 a position reads what its window or its group allows, in Gemma 3 of its group what is not before the
    window.
    """
    q, k, v = arrays()
    groups = np.array([[3, 3, 3, 0, 0, 0], [0, 7, 7, 7, 7, 0]])
    context = Context("causal", groups=jnp.asarray(groups), window=jnp.asarray(2), groups_exceed_window=exceeds)
    mask = last_of(readable(2, 6, 6, causal=True), 2)
    mask[0, :3, :3] = mask[1, 1:5, 1:5] = True
    if not exceeds:
        mask &= np.arange(6) > np.arange(6)[:, None] - 2
    out = jax.jit(lambda *qkv: module.attention(*qkv, context, implementation=in_blocks))(q, k, v)
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("block", [None, 3])
def test_a_softcap_bounds_the_logits(in_blocks, block):
    """Before a mask; in one loop over positions, in float64."""
    q, k, v = (np.float64(x) for x in arrays(kv_heads=4))
    logits = 1.5 * np.tanh(np.einsum("bqhd,bkhd->bhqk", q, k) * 0.7 / 1.5)
    places = np.arange(6)
    mask = places[:, None] >= places if block is None else places[:, None] // block == places // block
    weights = np.exp(logits) * mask
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    context = Context("causal" if block is None else "full", block=block, softcap=1.5)
    given = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out = jax.jit(lambda *qkv: module.attention(*qkv, context, scale=0.7, implementation=in_blocks))(*given)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_softcap_with_a_cache_and_a_bias():
    """The cap is of the products of all keys, and a bias is added to what it gives."""
    q, k, v = arrays(kv_heads=4)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6, 6)), jnp.float32)
    logits = 1.5 * np.tanh(np.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5 / 1.5)
    weights = np.exp(logits + bias)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    out = attention(q, k, v, Context("full", softcap=1.5), bias=bias)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    past = KeyValue(k[:, :4].transpose(0, 2, 3, 1), v[:, :4].transpose(0, 2, 1, 3))
    weights = np.exp(logits)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    out = attention(q, k[:, 4:], v[:, 4:], Context("full", softcap=1.5), past=past)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_cudnn_refuses_a_softcap():
    q, k, v = arrays(queries=128, keys=128)
    context = Context("full", softcap=1.5)
    with pytest.raises(ValueError, match=tried("cudnn attention takes no softcap; leave `implementation` None")):
        module.attention(q, k, v, context, implementation="cudnn")
    assert jax.eval_shape(lambda: module.attention(q, k, v, context)).shape == q.shape


def test_a_window_counts_no_padding_of_a_cache(reference):
    """Prompts of two and of four tokens, padded on the right and on the left, two empty slots, and two tokens."""
    q, k, v = arrays(queries=2, keys=8)
    key_segments = np.array([[1, 1, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1]])
    given = [jnp.asarray(x) for x in (np.ones((2, 2), int), key_segments)]
    out = attention(q, k, v, Context("causal", *given, window=jnp.asarray(3)))
    mask = np.zeros((2, 2, 8), bool)
    mask[0, 0, [0, 1, 6]] = mask[0, 1, [1, 6, 7]] = True
    mask[1, 0, [2, 3, 6]] = mask[1, 1, [3, 6, 7]] = True
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


def test_a_window_is_for_causal_attention():
    with pytest.raises(ValueError, match="an attention window is for causal attention, not full"):
        attention(*arrays(), Context("full", window=jnp.asarray(2)))


def test_a_query_without_a_key_stays_finite_forwards_and_backwards():
    q, k, v = arrays()
    context = Context("full", jnp.ones((2, 6), jnp.int32), jnp.zeros((2, 6), jnp.int32))
    out, grads = jax.jit(jax.value_and_grad(lambda qkv: attention(*qkv, context).sum()))([q, k, v])
    assert np.isfinite(out) and all(np.isfinite(grad).all() for grad in grads)


def test_softmax_is_in_float32_whatever_the_dtype(reference):
    q, k, v = arrays(dtype=jnp.bfloat16)
    # Of 1 + 1/256 and 1 bfloat16 keeps no difference, so 300 keys alike would lose their sum.
    k, v = jnp.tile(k[:, :1], (1, 300, 1, 1)), jnp.ones((2, 300, 2, 8), jnp.bfloat16)
    out = attention(q, k, v, Context("full"))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 1.0, atol=0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": jnp.asarray(4)}, "a window"),
        ({"branches": jnp.zeros((2, 128), jnp.int32)}, "branches"),
        ({"groups": jnp.zeros((2, 128), jnp.int32)}, "groups"),
    ],
    ids=["window", "branches", "groups"],
)
def test_a_mask_that_an_implementation_lacks_is_refused(given, said):
    q = jnp.zeros((2, 128, 4, 16))
    with pytest.raises(ValueError, match=f"splash attention takes no mask of {said}") as caught:
        module.attention(q, q, q, Context("causal", **given), implementation="splash")
    assert re.search(tried("splash attention takes no mask of {}; leave `implementation` None"), str(caught.value))
    assert jax.eval_shape(lambda: module.attention(q, q, q, Context("causal", **given))).shape == q.shape
    with pytest.raises(ValueError, match="queries after earlier keys"):
        module.attention(q[:, :100], q, q, Context("causal"), implementation="splash")
    with pytest.raises(ValueError, match=f"blocks of 64 is full: expected no mask of {said}"):
        module.attention(q, q, q, Context("full", block=64, **given))


def test_splash_refuses_a_bias():
    q, k, v = arrays(queries=128, keys=128)
    bias = jnp.zeros((2, 4, 128, 128))
    with pytest.raises(ValueError, match=tried("{splash} attention takes no bias; leave `implementation` None")):
        module.attention(q, k, v, Context("full"), bias=bias, implementation="splash")
    assert jax.eval_shape(lambda: module.attention(q, k, v, Context("full"), bias=bias)).shape == q.shape


@pytest.mark.parametrize(
    ("platform", "dtype", "dim", "length", "context", "expected"),
    [
        ("cpu", jnp.float32, 64, 1024, Context("causal"), "xla"),
        ("cpu", jnp.float32, 64, 1025, Context("causal"), "blocked"),
        ("cpu", jnp.bfloat16, 64, 1025, Context("full", window=jnp.asarray(4)), "blocked"),
        ("gpu", jnp.float32, 64, 128, Context("causal"), "xla"),
        ("gpu", jnp.bfloat16, 64, 100, Context("causal"), "cudnn"),
        ("gpu", jnp.float16, 64, 128, Context("full"), "cudnn"),
        ("gpu", jnp.bfloat16, 64, 128, Context("causal", softcap=50.0), "xla"),
        ("tpu", jnp.bfloat16, 64, 128, Context("causal", softcap=50.0), "splash"),
        ("tpu", jnp.bfloat16, 64, 128, Context("causal", softcap=50.0, window=jnp.asarray(4)), "flash"),
        ("gpu", jnp.bfloat16, 12, 128, Context("full"), "xla"),
        ("gpu", jnp.bfloat16, 576, 128, Context("full"), "xla"),
        ("tpu", jnp.bfloat16, 128, 128, Context("full"), "splash"),
        ("tpu", jnp.bfloat16, 72, 256, Context("full"), "xla"),
        ("tpu", jnp.bfloat16, 72, 257, Context("full"), "splash"),
        ("tpu", jnp.float32, 64, 256, Context("causal"), "splash"),
        ("tpu", jnp.bfloat16, 72, 729, Context("full"), "splash"),
        ("tpu", jnp.bfloat16, 64, 100, Context("full"), "xla"),
        ("tpu", jnp.bfloat16, 64, 128, Context("causal", window=jnp.asarray(4)), "flash"),
        ("tpu", jnp.bfloat16, 64, 128, Context("causal", groups=jnp.zeros((1, 128), jnp.int32)), "flash"),
        ("tpu", jnp.bfloat16, 64, 128, Context("full", branches=jnp.zeros((1, 128), jnp.int32)), "flash"),
    ],
)
def test_the_platform_chooses(monkeypatch, platform, dtype, dim, length, context, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.zeros((1, length, 1, dim), dtype)
    assert choose_implementation(x, x, context) == expected


@pytest.mark.parametrize(("rows", "expected"), [(1024, "xla"), (1025, "splash")])
def test_weights_that_would_fill_a_tpu_are_left_to_a_kernel(monkeypatch, rows, expected):
    """Of 16 heads and 256 positions: 4 GiB in float32, and more."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = []
    jax.eval_shape(
        lambda x: found.append(choose_implementation(x, x, Context("full"))),
        jax.ShapeDtypeStruct((rows, 256, 16, 72), jnp.bfloat16),
    )
    assert found == [expected]


def test_the_choice_is_logged_once(monkeypatch, caplog):
    entry._tell.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    caplog.set_level("INFO", "vlm_jax")
    x = jnp.zeros((1, 130, 1, 8))
    for window in (None, 3, 4):
        choose_implementation(x, x, Context("causal", window=None if window is None else jnp.asarray(window)))
    assert [record.getMessage() for record in caplog.records] == [
        "attention on tpu: splash, for causal attention inside segments",
        "attention on tpu: flash, for a window",
    ]
    caplog.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choose_implementation(x.astype(jnp.bfloat16), x, Context("causal", softcap=50.0))
    assert [record.getMessage() for record in caplog.records] == [
        "attention on gpu: xla, for a softcap, which cuDNN's kernel does not support"
    ]


@pytest.mark.parametrize(("platform", "length"), [("tpu", 257), ("cpu", 1025)])
def test_a_bias_is_for_the_written_out_softmax(monkeypatch, platform, length):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.zeros((1, length, 1, 64))
    assert choose_implementation(x, x, Context("full")) != "xla"
    assert choose_implementation(x, x, Context("full"), biased=True) == "xla"


def projected(reference, x, params, heads):
    return reference.dense(np.asarray(x, np.float64), params).reshape(*x.shape[:2], heads, -1)


@pytest.mark.parametrize(
    ("qk_norm", "over"), [(None, "head"), ("rms", "head"), ("layer", "head"), ("rms", "width"), ("layer", "width")]
)
def test_multi_head_attention(reference, qk_norm, over):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 12)), jnp.float32)
    positions = np.array([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 8]])
    theta, half = 100.0, 4
    angles = jnp.asarray(positions[..., None] * theta ** (-np.arange(half) / half), jnp.float32)
    segments = jnp.asarray(SEGMENTS)
    layer = MultiHeadAttention(
        4, num_kv_heads=2, head_dim=8, qk_norm=qk_norm, qk_norm_over=over, norm_epsilon=1e-3, out_dim=10
    )
    context = Context("causal", segments, segments, angles=angles)
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x, context)))
    out, cache = jax.jit(layer.apply)(params, x, context)
    assert cache is None

    p = jax.tree.map(np.float64, params["params"])
    q, k, v = (projected(reference, x, p[n], h) for n, h in (("query", 4), ("key", 2), ("value", 2)))

    def normed(y, given):
        flat = y if over == "head" else y.reshape(2, 6, -1)
        if qk_norm == "rms":
            flat = reference.rms_norm(flat, given["scale"], 1e-3)
        if qk_norm == "layer":
            flat = reference.layer_norm(flat, given["scale"], given["bias"], 1e-3)
        return flat.reshape(y.shape)

    if qk_norm is not None:
        q, k = normed(q, p["query_norm"]), normed(k, p["key_norm"])
    q, k = reference.rotate(q, positions, theta), reference.rotate(k, positions, theta)
    mask = readable(2, 6, 6, causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS)
    expected = reference.dense(reference.attention(q, k, v, mask).reshape(2, 6, -1), p["out"])
    assert out.shape == (2, 6, 10)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_cross_attention_reads_keys_and_values_from_two_places(reference):
    rng = np.random.default_rng(0)
    x, keys, values = (jnp.asarray(rng.normal(size=(2, n, d)), jnp.float32) for n, d in ((3, 8), (5, 6), (5, 6)))
    layer = MultiHeadAttention(2, use_bias=False, out_bias=False)
    given = {"inputs_k": keys, "inputs_v": values}
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x, Context("full"), **given)))
    assert all(set(tree) == {"kernel"} for tree in params["params"].values())
    out, _ = jax.jit(layer.apply)(params, x, Context("full"), **given)
    p = jax.tree.map(np.float64, params["params"])
    q, k, v = (projected(reference, y, p[n], 2) for y, n in ((x, "query"), (keys, "key"), (values, "value")))
    expected = reference.dense(reference.attention(q, k, v).reshape(2, 3, -1), p["out"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 6])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("length", [1, 2])
def test_a_cache_is_read_before_what_is_new_and_that_is_returned(reference, slots, heads, length):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, length, 8)), jnp.float32)
    old = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 1, 2, 4, slots), (3, 1, 2, slots, 4))]
    past = KeyValue(*(leaf[1] for leaf in old))
    layer, ones = MultiHeadAttention(heads, num_kv_heads=2, head_dim=4), jnp.ones((1, length), jnp.int32)
    key_segments = np.concatenate([[[1, 1, 0, 1, 0, 0]], ones], axis=1)[:, 6 - slots :]
    context = Context("causal", ones, jnp.asarray(key_segments))
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x, Context("full"))))
    out, fresh = jax.jit(layer.apply)(params, x, context, cache=past)
    p = jax.tree.map(np.float64, params["params"])
    q, k, v = (projected(reference, x, p[n], heads if n == "query" else 2) for n in ("query", "key", "value"))
    np.testing.assert_allclose(fresh.key, k.transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(fresh.value, v.transpose(0, 2, 1, 3), atol=1e-5)
    keys = np.concatenate([np.float64(old[0][1]).transpose(0, 3, 1, 2), k], axis=1)
    values = np.concatenate([np.float64(old[1][1]).transpose(0, 2, 1, 3), v], axis=1)
    mask = readable(
        1, length, slots + length, causal=True, offset=slots, query_segments=ones, key_segments=key_segments
    )  # fmt: skip
    expected = reference.dense(reference.attention(q, keys, values, mask).reshape(1, length, -1), p["out"])
    np.testing.assert_allclose(out, expected, atol=1e-5)
