"""What the host holds while parameters are read: counted, not timed."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.checkpoints import placement
from vlm_jax.checkpoints.hub import LazyTensor, open_checkpoint
from vlm_jax.checkpoints.ops import LINEAR
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.rules import Rule
from vlm_jax.checkpoints.saving import save_checkpoint

LAYERS, ROWS, COLUMNS = 6, 1024, 512
TENSOR_BYTES = ROWS * COLUMNS * 4
RULES = (
    Rule("layers.{layer}.up.weight", "up/kernel", LINEAR),
    Rule("layers.{layer}.down.weight", "down/kernel"),
    Rule("embed.weight", "embedding"),
)
SPECS = {
    "one device": None,
    "rows": PartitionSpec(None, None, ("fsdp", "tensor")),
    "columns": PartitionSpec(None, ("fsdp", "tensor")),
    "both, layers too": PartitionSpec("fsdp", "tensor"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    random = np.random.default_rng(0)
    tensors = {"embed.weight": random.normal(size=(ROWS, COLUMNS)).astype(np.float32)}
    for layer in range(LAYERS):
        for name in ("up", "down"):
            tensors[f"layers.{layer}.{name}.weight"] = random.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    folder = tmp_path_factory.mktemp("released")
    save_checkpoint(folder, tensors, max_shard_bytes=3 * TENSOR_BYTES)
    return open_checkpoint(folder), tensors


def targets(spec, dtype=np.float32):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))

    def leaf(*shape):
        sharding = None if spec is None else NamedSharding(mesh, PartitionSpec(*spec[3 - len(shape) :]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {
        "up": {"kernel": leaf(LAYERS, COLUMNS, ROWS)},
        "down": {"kernel": leaf(LAYERS, ROWS, COLUMNS)},
        "embedding": leaf(ROWS, COLUMNS),
    }


def check(params, tensors, dtype=np.float32):
    np.testing.assert_array_equal(params["embedding"], tensors["embed.weight"].astype(dtype))
    for layer in range(LAYERS):
        up, down = (tensors[f"layers.{layer}.{name}.weight"].astype(dtype) for name in ("up", "down"))
        np.testing.assert_array_equal(params["up"]["kernel"][layer], up.T)
        np.testing.assert_array_equal(params["down"]["kernel"][layer], down)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("devices", ["host memory", "memory of their own"])
def test_the_host_holds_a_tensor_beside_what_its_devices_hold(checkpoint, monkeypatch, spec, devices):
    monkeypatch.setattr(placement, "CUT_BYTES", 2**16)
    if devices == "memory of their own":
        monkeypatch.setattr(placement, "_in_host_memory", lambda leaf: False)
    buffers = []
    memory = placement._memory

    def noted(*arguments):
        buffers.append(memory(*arguments))
        return buffers[-1]

    monkeypatch.setattr(placement, "_memory", noted)
    released, tensors = checkpoint
    check(import_params(RULES, released, targets(spec)), tensors)  # and compiles what it needs
    buffers.clear()
    tracemalloc.start()
    params = import_params(RULES, released, targets(spec))
    _, peak = tracemalloc.get_traced_memory()  # NumPy's memory; neither XLA's nor pages that are mapped
    tracemalloc.stop()
    if devices == "host memory":  # the buffers that were filled are the devices' own
        shards = {s.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards}
        assert shards == {buffer.ctypes.data for buffer in buffers}
        assert peak < 0.5 * TENSOR_BYTES  # cuts alone
    else:  # every part of a stack that is split waits for the others; the embedding is not a stack
        # Below two tensors: cuts stay until their transfers end, later on a busy machine.
        assert peak < 1.6 * TENSOR_BYTES * (2 if spec == SPECS["both, layers too"] else 1)
        assert sum(buffer.nbytes for buffer in buffers) == TENSOR_BYTES


@pytest.mark.parametrize("devices", ["host memory", "memory of their own"])
def test_values_are_cast_where_they_go(checkpoint, monkeypatch, devices):
    if devices == "memory of their own":
        monkeypatch.setattr(placement, "_in_host_memory", lambda leaf: False)
    released, tensors = checkpoint
    params = import_params(RULES, released, targets(SPECS["rows"], ml_dtypes.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    check(params, tensors, ml_dtypes.bfloat16)


def test_parameters_without_a_mesh_are_on_the_default_device_and_free_to_move(checkpoint):
    params = import_params(RULES, checkpoint[0], targets(None))
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {jax.devices()[0]}
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


def test_giving_parameters_away_leaves_the_replicas_of_others_alone():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    leaf = jax.ShapeDtypeStruct((64,), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    params = import_params([Rule("t", "t")], {"t": np.arange(64, dtype=np.float32)}, {"t": leaf})
    more = jax.jit(lambda x: x + 1, donate_argnums=0)(params["t"])
    for shard in more.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(64) + 1)


@pytest.mark.parametrize(("by_rows", "reads"), [(True, TENSOR_BYTES // 2**16), (False, 1)])
def test_what_can_only_be_read_whole_is_read_once(monkeypatch, by_rows, reads):
    monkeypatch.setattr(placement, "CUT_BYTES", 2**16)
    values, log = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS), []

    def read(index):
        log.append(index)
        return values[index]

    tensor = LazyTensor(values.shape, values.dtype, read, by_rows=by_rows)
    leaf = jax.ShapeDtypeStruct((COLUMNS, ROWS), np.float32)
    params = import_params([Rule("t", "t", LINEAR)], {"t": tensor}, {"t": leaf})
    np.testing.assert_array_equal(params["t"], values.T)
    assert len(log) == reads
