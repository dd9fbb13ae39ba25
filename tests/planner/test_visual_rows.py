"""Rows of visual tokens stay on the device of their sequence: in programs for CPUs and a TPU, with the same numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.pool import Pool
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.program_text import parse_program
from vlm_jax.processors.patches import pack_patches
from vlm_jax.reducers.divprune import DivPrune
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import BATCH_AXES, placed, use_mesh
from vlm_jax.types import Batch, PackedImages

from ..parameters import drawn

ROWS, LENGTH, WIDTH = 8, 10, 64  # kernels are larger than activations, which XLA would rather move
COMPUTED = {"gather", "scatter", "scatter-add", "top_k", "sort", "select_n"}  # what moves rows, or chooses them


def of_pixels():
    """Two images of four tokens each in a row."""
    encoder = ViT(image_size=(16, 16), patch_size=4, width=WIDTH, depth=1, num_heads=2, mlp_dim=2 * WIDTH)
    images = np.random.default_rng(0).normal(size=(ROWS, 2, 16, 16, 3)).astype(np.float32)
    return VLM(encoder, Pool(WIDTH, (2, 2)), decoder()), images


def of_packed(reducer):
    """Two images of four and two tokens in a row, of which a reducer leaves two each."""
    saliency = reducer.required_fields().get("encoder", {})
    levels = () if saliency else (1,)  # of one kind, which the decoder's block adds
    sizes = {"patch_size": 2, "width": WIDTH, "depth": 2, "num_heads": 2, "mlp_dim": 2 * WIDTH}
    encoder = QwenViT(**sizes, window_size=8, full_layers=(1,), temporal_patch_size=1, levels=levels, **saliency)
    patches = np.random.default_rng(0).normal(size=(ROWS, 24, encoder.patch_dim)).astype(np.float32)
    grids = [(1, 4, 4), (1, 2, 4)]
    packed = [pack_patches(row, grids, merge_size=2, window=encoder.window, length=32) for row in patches]
    images = jax.tree.map(lambda *rows: np.concatenate(rows), *packed)
    places = PackedImages(np.array([[0, 4]] * ROWS, np.int32), np.array([[4, 2]] * ROWS, np.int32), 4)
    model = VLM(encoder, Concat(WIDTH, 2, levels=len(levels)), decoder(), reducer, reduce="tokens")
    return model, dataclasses.replace(images, images=places)


def decoder():
    return Transformer(12, WIDTH, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=2 * WIDTH)


CASES = {
    "pixels": of_pixels,
    **{one.kind: lambda one=one: of_packed(one) for one in (VisionZip(2), PruMerge(2), DivPrune(2))},
}


def batch_of(images):
    rng = np.random.default_rng(1)
    tokens = rng.integers(12, size=(ROWS, LENGTH)).astype(np.int32)
    index = np.stack([rng.permutation([-1] * 6 + [0, 1, 2, 3]) for _ in range(ROWS)]).astype(np.int32)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return Batch(tokens=tokens, positions=place, segment_ids=np.ones_like(tokens), visual_index=index, images=images)


def gradient(model):
    def loss(params, batch):
        return jnp.square(model.apply({"params": params}, batch, method="hidden")).mean()

    return jax.value_and_grad(loss)


def shapes(model, batch, mesh):
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return placed(boxed, mesh), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """A model and its batch, and its gradient compiled for 8 devices."""
    model, images = CASES[request.param]()
    batch = batch_of(images)
    mesh = make_mesh(MeshSettings(data=2, fsdp=4) if request.param == "pixels" else MeshSettings(data=1, fsdp=8))
    given = shapes(model, batch, mesh)
    with use_mesh(mesh):
        out = NamedSharding(mesh, PartitionSpec()), jax.tree.map(lambda leaf: leaf.sharding, given[0])
        compiled = jax.jit(gradient(model), out_shardings=out).lower(*given).compile()
    return model, batch, mesh, given, compiled


def test_no_collective_moves_visual_rows(case):
    _, _, mesh, given, compiled = case
    found = collectives(parse_program(compiled.as_text()), dict(mesh.shape))
    # The rows of the text, of a table that is divided by its width, may be exchanged.
    kinds = {one.kind for one in found if "decoder.embed" not in one.where}
    assert {"all-gather", "all-reduce"} <= kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    visual = [one for one in found if "VLM.embed" in one.where and "decoder.embed" not in one.where]
    assert visual and not [one.where for one in visual if one.where.rsplit("/", 1)[-1] in COMPUTED]
    # Parts of parameters are gathered for both passes, and gradients are summed over each axis; nothing else moves.
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(given[0]))
    moved = {kind: sum(one.given * one.times for one in found if one.kind == kind) for kind in kinds}
    assert moved["all-gather"] <= 1.1 * 2 * size / mesh.shape["fsdp"]
    assert moved["all-reduce"] <= 1.1 * size * sum(count > 1 for count in mesh.shape.values())


def test_values_and_gradients_are_those_of_one_device(case):
    model, batch, _, given, compiled = case
    params = drawn(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"]))
    value, expected = jax.jit(gradient(model))(params, batch)
    arrays = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), (params, batch), given)
    got_value, got = compiled(*arrays)
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * max(1e-3, np.abs(other).max()))


def test_a_training_step_for_a_tpu_moves_no_visual_rows(texts):
    mesh = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1, "expert": 1}
    found = collectives(parse_program(texts[0]), mesh)
    visual = [one for one in found if "VLM.embed" in one.where and "decoder.embed" not in one.where]
    assert visual and not [one.where for one in visual if one.where.rsplit("/", 1)[-1] in COMPUTED]
