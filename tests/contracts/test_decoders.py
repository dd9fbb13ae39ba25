"""The interface of `vlm_jax.decoders`, for every entry of the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import decoders
from vlm_jax.config import ConfigError
from vlm_jax.costs.flops import count_flops
from vlm_jax.decoders import DECODERS
from vlm_jax.decoders.mixed import BlockKind
from vlm_jax.layers.rope import Rope
from vlm_jax.sharding.rules import distribute, shardings, use_mesh
from vlm_jax.types import Drop

from ..advice import tried
from ..parameters import drawn
from .kinds import SIZES, defined, leaves, small

LENGTH, VOCAB = 8, SIZES["vocab_size"]

# Options that change what the layers of a kind do: the contract holds with them as well.
OPTIONS = {
    "transformer with heads of Qwen3, biases, YaRN and M-RoPE": (
        "transformer",
        {
            "head_dim": 12,
            "qk_norm": True,
            "qkv_bias": True,
            "rope": Rope(100.0, "yarn", factor=4.0, original_length=4, sections=(1, 2, 3)),
            "tie_embeddings": False,
        },
    ),
    "deepseek with plain attention, every other layer with experts": (
        "deepseek",
        {
            "latent_dim": None,
            "depth": 3,
            "num_dense": 0,
            "expert_every": 2,
            "scoring": "sigmoid",
            "normalize_weights": True,
            "tie_embeddings": True,
        },
    ),
    "transformer with a local block, norms from one and of outputs, softcaps, scaled embeddings": (
        "transformer",
        {
            "windows": (None, 3),
            "rope": Rope(100.0, "linear", factor=2.0),
            "local_rope": Rope(10.0),
            "norm": "rms_from_one",
            "post_norm": True,
            "qk_norm": True,
            "qk_scale": 0.5,
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
            "embedding_scale": 4.0,
        },
    ),
    "hybrid with partly rotated heads and biases, delta last": (
        "hybrid",
        {
            "mixers": ("attention", "delta"),
            "head_dim": 12,
            "rotary_width": 8,
            "rope": Rope(100.0, sections=(2, 1, 1), interleaved=True),
            "qkv_bias": True,
            "out_bias": True,
            "num_key_heads": 2,
            "num_value_heads": 2,
            "key_dim": 8,
            "norm_epsilon": 0.1,  # what one token reads is a multiple of its value, whose sign a norm would make all
            "tie_embeddings": False,
        },
    ),
}
OPTIONS["hybrid with experts"] = (
    "hybrid",
    {"norm_epsilon": 0.1, "expert_dim": 8, "num_experts": 4, "num_selected": 2},
)
OPTIONS["mixed with a local block, experts beside feed-forwards, a cap and values of keys"] = (
    "mixed",
    {
        "kinds": (
            BlockKind(8, 1, Rope(10.0), 3),
            BlockKind(12, 2, Rope(100.0, "proportional", rotated_share=0.5), value_is_key=True, reads_groups=False),
        ),
        "order": (0, 1),
        "expert_dim": 8,
        "num_experts": 4,
        "num_selected": 2,
        "logit_softcap": 3.0,
        "embedding_scale": 4.0,
    },
)
OPTIONS["mixed with inputs of every block, and blocks that share the keys of others"] = (
    "mixed",
    {
        "kinds": (
            BlockKind(8, 1, Rope(10.0), 3),
            BlockKind(12, 2, Rope(100.0)),
            BlockKind(8, 1, Rope(10.0), 3, mlp_dim=20, shares_with=0),
            BlockKind(12, 2, Rope(100.0), mlp_dim=20, shares_with=1),
        ),
        "order": (0, 1, 0, 2, 3, 2),
        "depth": 6,
        "qk_scale": 0.2,  # else a rounding error grows from block to block
        "own_input_dim": 6,
        "own_input_rows": VOCAB,
    },
)
CASES = {**{kind: (kind, {}) for kind in DECODERS}, **OPTIONS}

every_kind = pytest.mark.parametrize("kind", CASES)


def full(decoder, tokens, positions, segments, branches=None):
    hidden, _ = decoder(decoder.embed(tokens), positions, segments, branch_ids=branches, token_ids=tokens)
    return decoder.logits(hidden)


def with_cache(decoder, tokens, positions, segments, cache):
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache, token_ids=tokens)
    return decoder.logits(hidden), cache


def row(tokens):
    """One sequence as arguments of `full`: tokens, positions from 0, segment 1."""
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    return tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)


@functools.cache
def made(kind):
    name, fields = CASES[kind]
    decoder = small(DECODERS[name], **fields)
    init = functools.partial(decoder.init, method=full)
    return decoder, drawn(jax.eval_shape(init, jax.random.key(0), *row(np.zeros(LENGTH))))


@functools.cache
def run(kind, method=full, **fields):
    decoder, boxed = made(kind)
    return jax.jit(functools.partial(decoder.clone(**fields).apply, nn.meta.unbox(boxed), method=method))


def alone(kind, tokens):
    """Logits of a sequence by itself, padded to the one length that is compiled."""
    rest = ((0, 0), (0, LENGTH - len(tokens)))
    return run(kind)(*(jnp.pad(x, rest) for x in row(tokens)))[:, : len(tokens)]


@pytest.fixture
def text():
    return np.random.default_rng(2).integers(0, VOCAB, size=LENGTH)


@every_kind
def test_shapes_are_those_of_the_fields(kind, text):
    decoder, boxed = made(kind)
    assert decoder.vocab_size == VOCAB
    embedded = decoder.apply(boxed, row(text)[0], method="embed")
    assert embedded.shape == (1, LENGTH, decoder.width)
    hidden, cache = jax.eval_shape(decoder.apply, boxed, embedded, *row(text)[1:], token_ids=row(text)[0])
    assert hidden.shape == embedded.shape and cache is None
    logits = run(kind)(*row(text))
    assert logits.shape == (1, LENGTH, VOCAB) and logits.dtype == jnp.float32


@every_kind
def test_cached_equals_uncached_token_by_token(kind, text):
    tokens, positions, segments = row(text)
    expected = run(kind)(tokens, positions, segments)
    cache = made(kind)[0].init_cache(1, LENGTH + 2)  # more slots than are used
    shapes = [leaf.shape for leaf in jax.tree.leaves(cache)]
    step = run(kind, with_cache)
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, LENGTH))]:
        piece = (x[:, start:stop] for x in (tokens, positions, segments))
        logits, cache = step(*piece, cache)
        np.testing.assert_allclose(logits, expected[:, start:stop], atol=2e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == shapes


@every_kind
def test_a_prompt_into_an_empty_cache_takes_the_products_of_one_without(kind, text):
    decoder, boxed = made(kind)
    without = count_flops(functools.partial(decoder.apply, method=full), boxed, *row(text))
    into = functools.partial(decoder.apply, method=with_cache)
    assert count_flops(into, boxed, *row(text), decoder.init_cache(1, 16 * LENGTH)) == without


@every_kind
@pytest.mark.parametrize("cached", [False, True])
def test_padding_on_either_side_changes_nothing(kind, text, cached):
    tokens, positions, segments = row(text[:5])
    expected = run(kind)(*row(text))[:, :5]  # no token changes what is before it
    for widths, kept in (((3, 0), slice(3, None)), ((0, 3), slice(0, 5))):
        # What padding holds, ids and positions, is ignored.
        padded = [
            jnp.pad(x, ((0, 0), widths), constant_values=value)
            for x, value in ((tokens, 7), (positions, 2), (segments, 0))
        ]
        if cached:
            logits, _ = run(kind, with_cache)(*padded, made(kind)[0].init_cache(1, LENGTH))
        else:
            logits = run(kind)(*padded)
        np.testing.assert_allclose(logits[:, kept], expected, atol=2e-5)
        assert np.isfinite(logits).all()


@every_kind
def test_packed_segments_do_not_see_each_other(kind, text):
    positions, segments = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]), jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
    packed = run(kind)(row(text)[0], positions, segments)
    np.testing.assert_allclose(packed[:, :3], alone(kind, text[:3]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 3:], alone(kind, text[3:]), atol=2e-5)


@every_kind
def test_a_branch_reads_the_prefix_and_itself(kind, text):
    branches = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2]])
    positions = jnp.array([[0, 1, 2, 3, 4, 3, 4, 5]])
    together = run(kind)(row(text)[0], positions, jnp.ones((1, LENGTH), jnp.int32), branches)
    first, second = text[:5], np.concatenate([text[:3], text[5:]])
    np.testing.assert_allclose(together[:, :5], alone(kind, first), atol=2e-5)
    np.testing.assert_allclose(together[:, 5:], alone(kind, second)[:, 3:], atol=2e-5)


def grouped(decoder, tokens, positions, segments, groups, cache=None):
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache, group_ids=groups, token_ids=tokens)
    return decoder.logits(hidden), cache


GROUPED = (
    "deepseek",
    "transformer",
    "transformer with a local block, norms from one and of outputs, softcaps, scaled embeddings",
)


@pytest.mark.parametrize("kind", GROUPED)
def test_positions_of_a_group_read_each_other(kind, text):
    """What changes at the end of a group is read from its start on, and of one position it is what it is alone."""
    tokens, positions, segments = row(text)
    groups = jnp.array([[0, 2, 0, 5, 5, 5, 7, 0]])
    changed = text.copy()
    changed[5] = (changed[5] + 1) % VOCAB
    before, none = run(kind, grouped)(tokens, positions, segments, groups)
    after, _ = run(kind, grouped)(row(changed)[0], positions, segments, groups)
    assert none is None
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after).max(-1)[:, 3:] > 1e-4).all()
    np.testing.assert_allclose(before[:, :3], run(kind)(*row(text))[:, :3], atol=2e-5)
    decoder, boxed = made(kind)
    cached, cache = run(kind, grouped)(tokens, positions, segments, groups, decoder.init_cache(1, LENGTH + 2))
    np.testing.assert_allclose(cached, before, atol=2e-5)
    with pytest.raises(ValueError, match="group_ids: expected None after a prompt"):
        jax.eval_shape(functools.partial(decoder.apply, method=grouped), boxed, *row(text), groups, cache)


def test_a_gated_delta_layer_takes_no_groups(text):
    decoder, boxed = made("hybrid")
    with pytest.raises(ValueError, match=tried("got groups of positions that read each other; leave group_ids None")):
        jax.eval_shape(functools.partial(decoder.apply, method=grouped), boxed, *row(text), row(text)[2])
    jax.eval_shape(functools.partial(decoder.apply, method=grouped), boxed, *row(text), None)


def test_visual_tokens_are_ranked_by_a_layer_with_attention():
    fields = {"depth": 3, "mixers": ("delta", "attention", "delta")}
    advice = tried("choose layers of the reducer such that they are ranked by some of {}")
    with pytest.raises(ConfigError, match=advice):
        small(DECODERS["hybrid"], **fields, drops=(Drop(1, 4, 0),))
    assert small(DECODERS["hybrid"], **fields, drops=(Drop(2, 4, 1),)).drops


def test_numbers_of_experts_of_a_hybrid_without_experts_are_refused():
    with pytest.raises(ValueError, match=tried("are of experts, and there are none; set expert_dim")):
        small(DECODERS["hybrid"], num_selected=2)
    assert small(DECODERS["hybrid"], num_selected=2, num_experts=4, expert_dim=8).num_selected == 2


@every_kind
@pytest.mark.parametrize("place", [0, 4, LENGTH - 1])
def test_a_token_changes_nothing_before_it(kind, text, place):
    changed = text.copy()
    changed[place] = (changed[place] + 1) % VOCAB
    before, after = run(kind)(*row(text)), run(kind)(*row(changed))
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (np.abs(before - after).max(-1)[:, place:] > 1e-4).all()


@every_kind
def test_only_distances_between_positions_matter(kind, text):
    tokens, positions, segments = row(text)
    shifted = run(kind)(tokens, positions + 5, segments)
    np.testing.assert_allclose(shifted, run(kind)(tokens, positions, segments), atol=5e-5)
    stretched = run(kind)(tokens, positions * 2, segments)
    assert np.abs(stretched - shifted).max() > 1e-3


@every_kind
def test_every_parameter_has_a_finite_gradient(kind, text):
    decoder, boxed = made(kind)

    def loss(params):
        logits = decoder.apply(params, *row(text), method=full)
        return jnp.sum(jnp.sin(logits + jnp.arange(VOCAB)[None, None]))

    for path, grad in leaves(jax.jit(jax.grad(loss))(boxed)).items():
        assert np.isfinite(grad).all(), path
        if path.endswith("['output_scale']"):  # which is stored and not learned
            assert not grad.any()
            continue
        assert np.abs(grad).max() > 1e-5, path


@every_kind
def test_bfloat16_is_near_to_float32(kind, text):
    exact, low = run(kind)(*row(text)), run(kind, dtype=jnp.bfloat16)(*row(text))
    assert low.dtype == jnp.float32  # logits are, whatever computes them
    assert np.linalg.norm(low - exact) / np.linalg.norm(exact) < 0.03


@every_kind
def test_sharded_equals_unsharded(kind, mesh):
    decoder, boxed = made(kind)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, size=(8, LENGTH)), jnp.int32)
    batch = (tokens, jnp.tile(jnp.arange(LENGTH)[None], (8, 1)), jnp.ones_like(tokens))
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with use_mesh(mesh):
        got = jax.jit(functools.partial(decoder.apply, method=full))(placed, *distribute(batch, mesh))
    np.testing.assert_allclose(got, np.concatenate([run(kind)(*row(one)) for one in tokens]), atol=2e-5)


def test_every_decoder_of_the_folder_is_in_the_table():
    missing = [cls.__name__ for cls in defined(decoders, "init_cache") if cls not in DECODERS.values()]
    assert not missing, f"add {missing} to DECODERS in vlm_jax/decoders/__init__.py"
