"""What travels between the devices of a compiled program."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.pool import Pool
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.encoders.vit import ViT
from vlm_jax.losses.cross_entropy import head_cross_entropy
from vlm_jax.losses.vocabulary_blocks import Blocks
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.patches import pack_patches
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import BATCH_AXES, use_mesh
from vlm_jax.types import Batch

ROWS, LENGTH = 8, 6
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    """A collective operation: its kind, and the shapes of what it gives to one device."""

    kind: str
    shapes: list[tuple[int, ...]]


def collectives(program):
    found = re.findall(rf"= (\S.*?) ({KINDS})(?:-start)?\(", program.as_text())
    sizes = [re.findall(r"\w+\[([\d,]*)\]", result) for result, _ in found]
    shapes = [[tuple(int(n) for n in size.split(",") if n) for size in each] for each in sizes]
    return [Collective(kind, each) for (_, kind), each in zip(found, shapes, strict=True)]


def placed(tree, mesh, spec):
    def of(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(of, tree)


def of_pixels():
    """Two images of two tokens each in a row."""
    encoder = ViT(image_size=(8, 16), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=16)
    return encoder, Pool(16, (1, 2)), np.zeros((ROWS, 2, 8, 16, 3), np.float32)


def of_packed_patches():
    """Two images of four and two tokens, in windows, whose order the encoder restores."""
    encoder = QwenViT(
        patch_size=2, width=8, depth=2, num_heads=2, mlp_dim=16, window_size=8, full_layers=(1,), temporal_patch_size=1
    )
    patches = np.zeros((24, encoder.patch_dim), np.float32)
    one = pack_patches(patches, [(1, 4, 4), (1, 2, 4)], merge_size=2, window=encoder.window, length=32)
    return encoder, Concat(16, 2), jax.tree.map(lambda x: np.repeat(x, ROWS, axis=0), one)


@pytest.mark.parametrize("tower", [of_pixels, of_packed_patches])
def test_visual_rows_stay_on_the_device_of_their_row(tower):
    """Of data parallelism, devices exchange the gradients of parameters, and nothing that has a batch axis."""
    encoder, connector, images = tower()
    decoder = Transformer(12, 16, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=24)
    model = VLM(encoder=encoder, connector=connector, decoder=decoder)
    ints = np.zeros((ROWS, LENGTH), np.int32)
    batch = Batch(tokens=ints, positions=ints, segment_ids=ints, visual_index=ints, images=images)
    mesh = make_mesh(MeshSettings(data=8))
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    given = placed(params, mesh, P()), placed(batch, mesh, P(BATCH_AXES))
    with use_mesh(mesh):
        loss = jax.grad(lambda params, batch: jnp.square(model.apply({"params": params}, batch, method="hidden")).sum())
        found = collectives(jax.jit(loss).lower(*given).compile())
    assert {each.kind for each in found} == {"all-reduce"}
    exchanged = sum(math.prod(shape) for each in found for shape in each.shapes)
    assert exchanged <= sum(leaf.size for leaf in jax.tree.leaves(params))


def test_blocks_of_the_vocabulary_are_gathered_one_by_one():
    """Over `fsdp` a device gets a block of the head's kernel at a time, and never another device's share of ids."""
    length, width, vocab, shards, size = 16, 8, 960, 2, 48
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=shards))
    shapes = {
        "hidden": ((ROWS, length, width), jnp.float32, P(BATCH_AXES)),
        "kernel": ((vocab, width), jnp.float32, P("tensor", "fsdp")),
        "targets": ((ROWS, length), jnp.int32, P(BATCH_AXES)),
        "weights": ((ROWS, length), jnp.float32, P(BATCH_AXES)),
    }
    given = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in shapes.items()
    }

    def loss(hidden, kernel, targets, weights):
        return head_cross_entropy(hidden, kernel, targets, weights, blocks=Blocks(0, size, shards)).value

    with use_mesh(mesh):
        own = given["hidden"].sharding, given["kernel"].sharding
        program = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=own).lower(*given.values()).compile()
    gathered = [shape for each in collectives(program) if each.kind == "all-gather" for shape in each.shapes]
    assert gathered and max(math.prod(shape) for shape in gathered) <= size * width
    text = program.as_text()
    held = {math.prod(int(n) for n in each.split(",") if n) for each in re.findall(r"f32\[([\d,]*)\]", text)}
    assert max(held) < ROWS // 4 * length * vocab // shards
