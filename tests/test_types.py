"""Structs are frozen pytrees whose shapes are checked where they are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.types import Batch, VisualFeatures, VisualTokens, static_field, struct


def features(count=4, grid=(2, 2)):
    return VisualFeatures(jnp.ones((2, count, 3)), jnp.ones((2, count), bool), grid)


def test_static_fields_are_structure_and_the_rest_leaves():
    leaves, structure = jax.tree.flatten(features())
    assert [leaf.shape for leaf in leaves] == [(2, 4, 3), (2, 4)]  # None is not a leaf
    assert structure == jax.tree.structure(features())
    assert structure != jax.tree.structure(features(grid=(1, 4)))
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert rebuilt.grid == (2, 2) and rebuilt.pooled is None and rebuilt.tokens is leaves[0]


def test_leaves_are_named_by_their_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(features())]
    assert paths == [".tokens", ".mask"]


def test_a_static_field_makes_another_program():
    traced = []

    @jax.jit
    def run(given):
        traced.append(given.grid)
        return given.tokens.sum()

    for grid in ((2, 2), (2, 2), (1, 4)):
        assert run(features(grid=grid)) == 24
    assert traced == [(2, 2), (1, 4)]


def test_transformations_map_leaves_to_anything():
    # Shapes are checked in __init__, which a tree operation does not call.
    named = jax.tree.map(lambda leaf: str(leaf.shape), features())
    assert isinstance(named, VisualFeatures) and named.tokens == "(2, 4, 3)"
    doubled = jax.vmap(lambda x: jax.tree.map(lambda leaf: leaf, x))(
        VisualTokens(jnp.ones((2, 4, 3)), jnp.ones((2, 4), bool))
    )
    assert doubled.tokens.shape == (2, 4, 3)


def test_structs_are_frozen_and_replaced():
    given = features()
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.grid = (1, 4)
    assert dataclasses.replace(given, grid=(1, 4)).grid == (1, 4)


def test_shapes_are_checked_where_a_struct_is_made():
    with pytest.raises(TypeError, match="mask"):
        VisualTokens(jnp.ones((2, 4, 3)), jnp.ones((2, 5), bool))
    with pytest.raises(TypeError, match="mask"):
        VisualTokens(jnp.ones((2, 4, 3)), jnp.ones((2, 4)))


def test_a_batch_takes_host_arrays_device_arrays_and_shapes():
    for make in (np.zeros, jnp.zeros, jax.ShapeDtypeStruct):
        row = make((2, 5), jnp.int32)
        batch = Batch(row, row, row, row)
        assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2, 5)] * 4


def test_defaults_and_static_settings_work_as_in_a_dataclass():
    @struct
    class Pair:
        first: int
        second: str = static_field(default="x")

    assert Pair(3) == Pair(3, "x")
    assert jax.tree.leaves(Pair(3)) == [3]
    assert jax.tree.map(lambda x: x + 1, Pair(3, "y")) == Pair(4, "y")
