"""From logical names to places on the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax import axes
from vlm_jax.layers.dense import Named
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import batch_shards, counted_rows, distribute, partition_spec, shardings, use_mesh

BATCHED = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        ((axes.EMBED, axes.MLP), (4, 6), P("fsdp", "tensor")),
        ((axes.LAYERS, axes.EMBED, axes.HEADS), (3, 4, 6), P(None, "fsdp", "tensor")),
        ((axes.VOCAB, axes.EMBED), (10, 4), P("tensor", "fsdp")),
        ((axes.NORM,), (4,), P(None)),
        ((None, axes.MLP), (4, 4), P(None, "tensor")),
        (BATCHED, (4, 6, 8), P(("data", "fsdp"), "context", None)),
        # A size that the axis does not divide stays whole.
        ((axes.EMBED, axes.MLP), (3, 6), P(None, "tensor")),
        ((axes.EMBED, axes.MLP), (4, 7), P("fsdp", None)),
        (BATCHED, (6, 6, 8), P(None, "context", None)),
        # An axis serves the first dimension that can have it.
        ((axes.EMBED, axes.EMBED), (4, 4), P("fsdp", None)),
        ((axes.EMBED, axes.EMBED), (3, 4), P(None, "fsdp")),
        ((axes.MLP, axes.HEADS), (4, 4), P("tensor", None)),
        ((axes.BATCH, axes.EMBED), (4, 4), P(("data", "fsdp"), None)),
        ((axes.EMBED, axes.BATCH), (4, 4), P("fsdp", None)),
        ((), (), P()),
    ],
)
def test_partition_spec(mesh, names, shape, expected):
    spec = partition_spec(names, shape, mesh)
    assert spec == expected
    jax.device_put(jnp.zeros(shape), NamedSharding(mesh, spec)).block_until_ready()  # XLA takes it


def test_a_name_without_a_rule_is_an_error(mesh):
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",), (4,), mesh)


def test_shardings_follow_the_names_and_replicate_the_rest(mesh):
    tree = {
        "kernel": Named(jnp.zeros((4, 6)), (axes.EMBED, axes.MLP)),
        "step": jnp.zeros(()),
        "masked": Named(None, (axes.EMBED, axes.MLP)),
    }
    got = shardings(tree, mesh)
    assert got == {
        "kernel": NamedSharding(mesh, P("fsdp", "tensor")),
        "step": NamedSharding(mesh, P()),
        "masked": None,
    }
    placed = jax.device_put(
        nn.meta.unbox({k: tree[k] for k in ("kernel", "step")}), {k: got[k] for k in ("kernel", "step")}
    )
    assert {shard.data.shape for shard in placed["kernel"].addressable_shards} == {(2, 3)}
    assert placed["step"].sharding.is_fully_replicated


def constrained(x):
    return nn.with_logical_constraint(x * 2.0, BATCHED)


def test_use_mesh_makes_constraints_take_effect(mesh):
    x = jnp.arange(8 * 4 * 2, dtype=jnp.float32).reshape(8, 4, 2)
    with use_mesh(mesh):
        compiled = jax.jit(constrained).lower(x).compile()
    assert compiled.output_shardings.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "context", None)), 3)
    out = compiled(jax.device_put(x, compiled.input_shardings[0][0]))
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 4, 2)}
    np.testing.assert_array_equal(out, 2.0 * np.asarray(x))


def test_without_a_mesh_constraints_do_nothing():
    compiled = jax.jit(constrained).lower(jnp.zeros((8, 4, 2))).compile()
    assert len(compiled.output_shardings.device_set) == 1


def test_use_mesh_ends_with_its_block(mesh):
    with pytest.raises(RuntimeError, match="inside"), use_mesh(mesh):
        assert nn.get_logical_axis_rules()
        raise RuntimeError("inside")
    assert nn.get_logical_axis_rules() == ()
    assert jax.sharding.get_abstract_mesh().empty


def test_a_batch_lies_over_data_and_fsdp(mesh):
    batch = {"tokens": np.arange(8 * 3).reshape(8, 3), "weights": np.arange(8.0), "none": None}
    got = distribute(batch, mesh)
    assert {shard.data.shape for shard in got["tokens"].addressable_shards} == {(2, 3)}
    assert {shard.data.shape for shard in got["weights"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(got["tokens"], batch["tokens"])
    assert got["none"] is None


@dataclasses.dataclass(frozen=True)
class Device:
    """One of a host that is not here."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("shape", "hosts", "expected"),  # (data, fsdp, tensor, context, expert), hosts of devices, shards of each host
    [
        ((2, 2, 1, 1, 1), "0011", [(0, 1), (2, 3)]),
        ((1, 4, 1, 1, 1), "0101", [(0, 2), (1, 3)]),
        ((2, 1, 2, 2, 1), "00112233", [(0,), (0,), (1,), (1,)]),
        ((1, 1, 2, 1, 2), "0011", [(0,), (0,)]),
        ((1, 2, 1, 1, 2), "0001", [(0, 1), (1,)]),
    ],
)
def test_hosts_read_the_rows_of_their_devices_and_count_each_row_once(shape, hosts, expected, monkeypatch):
    devices = np.array([Device(number, int(host)) for number, host in enumerate(hosts)], object)
    mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "tensor", "context", "expert"))
    counted = []
    for host, shards in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        batch_shards.cache_clear()
        assert batch_shards(mesh).own == shards
        rows = np.array([[2 * shard, 2 * shard + 1] for shard in shards]).ravel()
        counted += counted_rows({"rows": rows, "none": None}, mesh)["rows"].tolist()
    assert sorted(counted) == list(range(2 * shape[0] * shape[1]))
