"""Every parameter is named, dimension by dimension, and every name leads to a mesh axis."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.connectors import CONNECTORS
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import ENCODERS
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import BATCH_AXES, RULES
from vlm_jax.types import VisualFeatures

from .kinds import SIZES, small


def encoder_params(kind):
    images = jnp.zeros((1, *SIZES["image_size"], 3))
    return jax.eval_shape(small(ENCODERS[kind]).init, jax.random.key(0), images)


def cell_reader_params(kind):
    reader = CellReader(small(ENCODERS[kind]), (1, 1), 5)
    return jax.eval_shape(reader.init, jax.random.key(0), jnp.zeros((1, *SIZES["image_size"], 3)))


def connector_params(kind):
    connector = small(CONNECTORS[kind], **CONNECTORS[kind].for_budget(64, (8, 8)))
    init = functools.partial(connector.init, deterministic=True)
    features = VisualFeatures(jnp.zeros((1, 64, 12)), jnp.ones((1, 64), bool), (8, 8))
    return jax.eval_shape(init, jax.random.key(0), features)


def decoder_params(kind, **fields):
    def run(decoder, tokens):
        hidden, _ = decoder(decoder.embed(tokens), tokens, tokens)
        return decoder.logits(hidden)

    init = functools.partial(small(DECODERS[kind], **fields).init, method=run)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def untied_decoder_params(kind):
    return decoder_params(kind, tie_embeddings=False)


KINDS = [
    *((encoder_params, kind) for kind in ENCODERS),
    *((cell_reader_params, kind) for kind in ENCODERS),
    *((connector_params, kind) for kind in CONNECTORS),
    *((decoder_params, kind) for kind in DECODERS),
    (untied_decoder_params, "transformer"),
]


@pytest.mark.parametrize(("params", "kind"), KINDS)
def test_every_dimension_of_every_parameter_is_named(params, kind):
    tree = params(kind)
    boxed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert boxed
    for path, leaf in boxed:
        where = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), f"{where} has no names; make it with layers.dense.named"
        assert len(leaf.names) == leaf.value.ndim, f"{where}: {leaf.names} for the shape {leaf.value.shape}"
        unknown = set(leaf.names) - set(axes.ALL)
        assert not unknown, f"{where}: {unknown} are no names of vlm_jax/axes.py"
        assert all(name in RULES for name in leaf.names), f"{where}: {leaf.names}"
        if "'layers'" in where:
            assert leaf.names[0] == axes.LAYERS and leaf.value.shape[0] <= SIZES["depth"], where


def test_every_name_has_a_rule_and_every_rule_a_name():
    assert sorted(RULES) == sorted(axes.ALL)


def test_every_rule_leads_to_axes_of_the_mesh():
    known = set(make_mesh(MeshSettings()).axis_names)
    for name, wanted in [*RULES.items(), ("a batch", BATCH_AXES)]:
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        assert set(wanted) <= known, f"{name}: {wanted}"
        assert len(set(wanted)) == len(wanted), f"{name}: {wanted}"
