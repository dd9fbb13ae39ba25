"""DeepSeek's stacks, its cache, and its experts over a mesh; numbers of the layers are compared in `tests/layers`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.generation.engine import generate
from vlm_jax.layers.scan import LOSSES
from vlm_jax.models.vlm import VLM
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import distribute, shardings, use_mesh
from vlm_jax.types import Batch

from ..advice import tried
from ..parameters import drawn

VOCAB, LENGTH, ROWS = 16, 6, 4
WITHOUT_ATTENTION = {"vocab_size": VOCAB, "width": 16, "depth": 3, "num_heads": 4, "mlp_dim": 24}
WITHOUT_ATTENTION |= {"expert_dim": 8, "num_experts": 8, "num_selected": 3}
SIZES = {**WITHOUT_ATTENTION, "latent_dim": 8, "content_dim": 6, "rope_dim": 4, "value_dim": 5}


def text():
    ids = np.random.default_rng(0).integers(0, VOCAB, size=(ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(ids, positions, np.ones_like(ids), np.full_like(ids, -1))


@functools.cache
def made(**fields):
    model = VLM(None, None, Deepseek(**SIZES, **fields))
    return model, drawn(jax.eval_shape(model.init, jax.random.key(0), text()))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"depth": 4}, (("dense_0", range(1)), ("sparse_1", range(1, 4)))),
        ({"depth": 4, "num_dense": 0}, (("sparse_0", range(4)),)),
        ({"depth": 4, "num_dense": 4}, (("dense_0", range(4)),)),
        (
            {"depth": 6, "num_dense": 1, "expert_every": 3},
            (("dense_0", range(3)), ("sparse_3", range(3, 4)), ("dense_4", range(4, 6))),
        ),
    ],
)
def test_layers_of_a_kind_that_follow_one_another_are_one_stack(fields, expected):
    decoder = Deepseek(**{**SIZES, **fields})
    assert decoder.stacks() == expected
    init = functools.partial(VLM(None, None, decoder).init, jax.random.key(0))
    params = jax.eval_shape(init, text())["params"]["decoder"]
    for name, layers in expected:
        assert params[name]["layers"]["attention"]["out"]["kernel"].value.shape[0] == len(layers)
        assert ("router" in params[name]["layers"]["mlp"]) == name.startswith("sparse")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"latent_dim": None, "content_dim": 6, "rope_dim": 4, "value_dim": 5},
            "content_dim is not read by plain attention, rope_dim .*, value_dim is",
        ),
        (
            {"latent_dim": None, "query_latent_dim": 4},
            tried("Deepseek: {query_latent_dim is not read by plain attention}; leave these fields out"),
        ),
        ({"latent_dim": None, "logit_scale": 2.0}, "logit_scale is not read by plain"),
        ({"latent_dim": None, "attention_bias": True}, "attention_bias is not read by plain"),
        ({"latent_dim": 8, "num_kv_heads": 2}, "num_kv_heads is not read by latent"),
        (
            {"latent_dim": 8, "num_groups": 4, "num_selected_groups": 2},
            "num_groups is .*, num_selected_groups is .*greedy",
        ),
    ],
)
def test_fields_that_would_not_be_read_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Deepseek(**{**WITHOUT_ATTENTION, **fields})
    assert Deepseek(**{**WITHOUT_ATTENTION, "latent_dim": None}).latent_dim is None


def test_the_compressed_cache_holds_nothing_a_head():
    wide = Deepseek(**{**SIZES, "num_heads": 64}).init_cache(2, 10, jnp.bfloat16)
    sizes = [leaf.shape for leaf in jax.tree.leaves(wide.layers)]
    assert sizes == [(1, 2, 10, 8), (1, 2, 10, 4), (2, 2, 10, 8), (2, 2, 10, 4)]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.layers)} == {jnp.dtype(jnp.bfloat16)}


def test_a_step_takes_the_products_of_its_own_experts_over_latents():
    """Of one token over 512 slots and itself: projections, absorbed attention, dense and sparse feed-forwards."""
    slots, (heads, content, rope, value, latent, width) = 512, (4, 6, 4, 5, 8, 16)
    projections = width * (heads * (content + rope) + latent + rope) + heads * value * width
    absorbed = heads * latent * (content + value) + heads * (slots + 1) * (2 * latent + rope)
    sparse = width * 8 + 3 * width * 8 * (3 + 2)  # the router, three experts of eight, and two shared ones
    expected = 2 * (3 * (projections + absorbed) + 3 * width * 24 + 2 * sparse + width * VOCAB)
    model, boxed = made()
    cache = dataclasses.replace(model.decoder.init_cache(1, slots), is_empty=False)
    step = functools.partial(model.apply, nn.meta.unbox(boxed), method="extend")
    assert count_flops(step, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), cache) == expected


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}], ids=str)
def test_sharded_over_experts_equals_unsharded(sizes):
    model, boxed = made()
    mesh = make_mesh(MeshSettings(**sizes))
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))

    def run(variables, batch):
        logits, sown = model.apply(variables, batch, mutable=[LOSSES])
        return logits, sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))

    with use_mesh(mesh):
        got = jax.jit(run)(placed, distribute(text(), mesh))
    expected = jax.jit(run)(nn.meta.unbox(boxed), text())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)

    whole = generate(model, nn.meta.unbox(boxed)["params"], text(), max_new_tokens=8)
    shared = generate(model, placed["params"], text(), max_new_tokens=8, mesh=mesh)
    np.testing.assert_array_equal(shared.tokens, whole.tokens)
