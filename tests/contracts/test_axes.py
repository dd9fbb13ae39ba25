"""Every parameter is named, dimension by dimension, and every name leads to a mesh axis."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import axes
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import ENCODERS
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import BATCH_AXES, RULES
from vlm_jax.testing.kinds import SIZES, check_names, small


def encoder_params(kind):
    images = jnp.zeros((1, *SIZES["image_size"], 3))
    return jax.eval_shape(small(ENCODERS[kind]).init, jax.random.key(0), images)


def cell_reader_params(kind):
    reader = CellReader(small(ENCODERS[kind]), (1, 1), 5)
    return jax.eval_shape(reader.init, jax.random.key(0), jnp.zeros((1, *SIZES["image_size"], 3)))


def decoder_params(kind, **fields):
    def run(decoder, tokens):
        hidden, _ = decoder(decoder.embed(tokens), tokens, tokens, token_ids=tokens)
        return decoder.logits(hidden)

    init = functools.partial(small(DECODERS[kind], **fields).init, method=run)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def untied_decoder_params(kind):
    return decoder_params(kind, tie_embeddings=False)


KINDS = [
    *((encoder_params, kind) for kind in ENCODERS),
    *((cell_reader_params, kind) for kind in ENCODERS),
    *((decoder_params, kind) for kind in DECODERS),
    (untied_decoder_params, "transformer"),
]


@pytest.mark.parametrize(("params", "kind"), KINDS)
def test_every_dimension_of_every_parameter_is_named(params, kind):
    check_names(params(kind), SIZES["depth"])


def test_every_name_has_a_rule_and_every_rule_a_name():
    assert sorted(RULES) == sorted(axes.ALL)


def test_every_rule_leads_to_axes_of_the_mesh():
    known = set(make_mesh(MeshSettings()).axis_names)
    for name, wanted in [*RULES.items(), ("a batch", BATCH_AXES)]:
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        assert set(wanted) <= known, f"{name}: {wanted}"
        assert len(set(wanted)) == len(wanted), f"{name}: {wanted}"
