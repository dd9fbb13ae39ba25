"""Collectives of a decoder's gradient on other axes than `fsdp`, against closed forms of shapes and mesh."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.decoders.transformer import Transformer
from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.program_text import parse_program
from vlm_jax.planner.topology import open_topology
from vlm_jax.sharding.mesh import CONTEXT, MeshSettings, make_mesh
from vlm_jax.sharding.rules import BATCH_AXES, placed, use_mesh

ROWS, LENGTH, WIDTH, HEADS, DEPTH, ITEM = 8, 16, 32, 4, 2, 4  # of float32


def given_bytes(settings, devices=None):
    """Bytes of the operands by kind and axes, and those of a device's parameters, of blocks that are rematerialised."""
    mesh = make_mesh(settings, devices)
    decoder = Transformer(12, WIDTH, DEPTH, HEADS, HEADS, mlp_dim=2 * WIDTH, remat="full")

    def shaped(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES, CONTEXT)))

    hidden = shaped(ROWS, LENGTH, WIDTH, dtype=jnp.float32)
    places = shaped(ROWS, LENGTH, dtype=jnp.int32)
    params = placed(jax.eval_shape(decoder.init, jax.random.key(0), hidden, places, places)["params"], mesh)

    def loss(params, hidden, positions, segments):
        return jnp.square(decoder.apply({"params": params}, hidden, positions, segments)[0]).mean()

    with use_mesh(mesh):
        out = jax.tree.map(lambda leaf: leaf.sharding, params)
        program = jax.jit(jax.grad(loss), out_shardings=out).lower(params, hidden, places, places).compile()
    found = Counter()
    for one in collectives(parse_program(program.as_text()), dict(mesh.shape)):
        found[one.kind, one.axes] += one.times * one.given
    leaves = jax.tree.leaves(nn.meta.unbox(params))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return found, held


@pytest.mark.parametrize(("topology", "gradients"), [("v5e:2x4", 2), (None, 5)])
def test_tensor_parallel_blocks_sum_activations(topology, gradients):
    """A block sums the outputs of attention and MLP, that of attention again to recompute, and gradients of inputs.

    Those of queries, keys and values, and of gate and up, are partial sums of one gradient: XLA adds them before the
    sum over a TPU's chips, so that two suffice; on CPU devices it does not. Source: Shoeybi et al. 2020 (Megatron-LM),
    section 3.
    """
    found, held = given_bytes(MeshSettings(data=2, tensor=4), topology and open_topology(topology).devices)
    activation = ROWS // 2 * LENGTH * WIDTH * ITEM
    assert set(found) == {("all-reduce", ("tensor",)), ("all-reduce", ("data",))}, found
    assert found["all-reduce", ("tensor",)] == pytest.approx((2 + 1 + gradients) * DEPTH * activation, rel=0.1)
    assert found["all-reduce", ("data",)] == pytest.approx(held, rel=0.1)


def test_ring_attention_passes_keys_and_values_on():
    """Forward, to recompute and backward all but the own shard of keys and values arrive; their gradients go around.

    Source: Liu et al. 2023 (Ring Attention with Blockwise Transformers), section 3.
    """
    size = 8
    found, held = given_bytes(MeshSettings(data=1, context=size))
    pair = 2 * ROWS * LENGTH // size * WIDTH * ITEM
    marks = ROWS * 4 * LENGTH // size * ITEM  # of the keys
    assert set(found) == {("collective-permute", ("context",)), ("all-reduce", ("context",))}, found
    expected = DEPTH * (3 * (size - 1) * (pair + marks) + size * pair)
    assert found["collective-permute", ("context",)] == pytest.approx(expected, rel=0.1)
    assert found["all-reduce", ("context",)] == pytest.approx(held, rel=0.1)
