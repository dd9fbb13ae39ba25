"""Every exchange against the float64 loss of the full batch on 8 devices, its memory and its errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.exchange import EXCHANGES, STREAMED, device_loss, distributed
from vlm_jax.losses.two_tower import LOSSES, locked_image

from ..advice import tried


def mesh_of(*shape, names=("data",)):
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    assert devices.size == np.prod(shape)
    return Mesh(devices.reshape(shape), names)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_on_8_devices(compare, name, exchange):
    mesh = mesh_of(8)
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    # 5 examples a device: halves of the ring differ, and tiles of 3 leave a rest.
    _, gradients = compare(name, distributed(name, mesh, exchange=exchange, block_size=3), 40, prepare=place)
    assert {len(shard.data) for shard in gradients[0].addressable_shards} == {5}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("batch", [3, 6])
@pytest.mark.parametrize("name", ["sigmoid", "distillation"])
def test_an_odd_number_of_devices_with_one_example_or_two(compare, name, batch, exchange):
    compare(name, distributed(name, mesh_of(3), exchange=exchange), batch)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_examples_split_over_two_of_three_axes(compare, name, exchange):
    mesh = mesh_of(2, 2, 2, names=("data", "tensor", "fsdp"))
    compare(name, distributed(name, mesh, ("data", "fsdp"), exchange=exchange), 16)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", ["sigmoid", "distillation"])
def test_locked_image(compare, name, exchange):
    compare(name, locked_image(distributed(name, mesh_of(4), exchange=exchange)), 16, locked=True)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_inside_a_shard_map_of_the_caller(compare, name, exchange):
    inner = device_loss(name, "data", exchange=exchange)

    def loss(image, text, **arguments):
        specs = {key: P("data") if key.endswith("features") else P() for key in arguments}

        def block(image, text, arguments):
            # As a train step has it: the features are made on the device.
            return inner(jnp.tanh(image), jnp.tanh(text), **arguments)

        mapped = jax.shard_map(block, mesh=mesh_of(4), in_specs=(P("data"), P("data"), specs), out_specs=P())
        return mapped(jnp.arctanh(image), jnp.arctanh(text), arguments)

    compare(name, loss, 12)


def test_a_mesh_of_explicit_axes(compare):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    for name in LOSSES:
        compare(name, distributed(name, mesh), 16, prepare=place)


@functools.cache
def compiled(name, exchange, batch=32_768, width=768):
    mesh = mesh_of(8)

    def spec(*shape):
        sharding = NamedSharding(mesh, P("data") if shape else P())
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    loss = distributed(name, mesh, exchange=exchange)

    def total(image, text, scale, bias, *teacher):
        names = ("teacher_image_features", "teacher_text_features", "teacher_scale")[: len(teacher)]
        parts = loss(image, text, scale=scale, bias=bias, **dict(zip(names, teacher, strict=True)))
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

    arguments = [spec(batch, width), spec(batch, width), spec(), spec()]
    if LOSSES[name].has_teacher:
        arguments += [spec(batch, width), spec(batch, width), spec()]
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3))).lower(*arguments).compile()


def peak_bytes(program):
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.parametrize("exchange", STREAMED)
@pytest.mark.parametrize("name", LOSSES)
def test_peak_memory_is_a_sixth_of_the_gather(name, exchange):
    assert peak_bytes(compiled(name, exchange)) <= peak_bytes(compiled(name, "gather")) / 6


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_device_holds_all_logits(name, exchange):
    text = compiled(name, exchange).as_text()
    assert "[32768,32768]" not in text
    # The rows of one device are the gather's; the others hold a tile.
    assert ("[4096,32768]" in text) == (exchange == "gather")


@pytest.mark.parametrize(
    ("exchange", "first_targets", "gathers"),
    [("gather", set(), True), ("reduce", set(), False), ("shift", {"1"}, False), ("ring", {"1", "7"}, False)],
)
def test_messages_are_those_of_the_exchange(exchange, first_targets, gathers):
    text = compiled("sigmoid", exchange).as_text()
    assert set(re.findall(r"source_target_pairs=\{\{0,(\d)\}", text)) == first_targets
    assert ("all-gather" in text) == gathers


SQUARE = np.eye(12, dtype=np.float32)


def test_errors():
    mesh = mesh_of(8)
    with pytest.raises(ValueError, match="unknown exchange 'bidir'; known: gather, reduce, shift, ring"):
        distributed("sigmoid", mesh, exchange="bidir")
    with pytest.raises(ValueError, match="unknown loss 'clip'; known: softmax, sigmoid, distillation"):
        distributed("clip", mesh)
    with pytest.raises(ValueError, match="unknown mesh axis 'fsdp'; known: data"):
        distributed("sigmoid", mesh, "fsdp")
    with pytest.raises(ValueError, match="block_size of at least 1"):
        distributed("sigmoid", mesh, block_size=0)
    with pytest.raises(
        ValueError, match=tried("{8} devices along mesh axis {'data'}, got {12} examples; use {8} or {16}")
    ):
        distributed("sigmoid", mesh)(SQUARE, SQUARE, scale=1.0)
    for count in (8, 16):
        rows = np.resize(SQUARE, (count, 12))
        assert np.isfinite(distributed("sigmoid", mesh)(rows, rows, scale=1.0))
    with pytest.raises(ValueError, match=r"\(12, 12\) and \(8, 12\)"):
        distributed("sigmoid", mesh)(SQUARE, SQUARE[:8], scale=1.0)
    with pytest.raises(ValueError, match="got 1 of the three"):
        distributed("sigmoid", mesh)(SQUARE[:8], SQUARE[:8], scale=1.0, teacher_scale=1.0)
