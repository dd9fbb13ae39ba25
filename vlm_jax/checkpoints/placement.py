"""Parameters on their way from released tensors to their devices, a piece at a time.

A tensor is read in cuts of about a mebibyte along its rows, by several threads. A cut is cast, and copied to where
it belongs in every shard that wants some of it, so that each byte is read once however the parameter is laid out.

On a CPU the memory of a device is the host's: a shard is one host buffer, which becomes the device's own without a
copy. Elsewhere a stack of layers is made on its devices and filled there layer by layer, and the host holds what
goes to one place of the stack: at most one tensor of the release, or one for every part of a stack that is split.
"""

import functools
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Block = tuple[range, ...]  # one range for every axis
Position = tuple[int, ...]  # in a stack
Read = Callable[[Position, Block | None], Sequence[np.ndarray]]

CUT_BYTES = 2**20  # a cut and the lines of memory that its transpose goes to stay in a core's cache
_MIN_ROWS = 32  # a transposed row of which is a line of memory


def readers() -> ThreadPoolExecutor:
    """The threads that read and copy cuts; more than a few wait for memory."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="read")


def fill(
    leaves: Sequence[jax.ShapeDtypeStruct], depth: int, read: Read, axis: int | None, pool: Executor, *, cut: bool
) -> list[Any]:
    """The parameters that come from the same tensors, on their devices.

    Args:
      leaves: shape, dtype and sharding of each; those without a sharding go to the default device, uncommitted.
      depth: leading axes of each that are a stack.
      read: given a position in the stack and a block of the other axes, the block of every parameter, in any
        dtype; given None for the block, all of each.
      axis: of the axes behind the stack, the one along which the rows of the one tensor lie; None where
        tensors are only read whole.
      pool: runs reads and copies.
      cut: blocks are read in cuts; else what is read costs the same in one.
    """
    parameters = [(_OnDevices if depth and not _in_host_memory(leaf) else _Buffers)(leaf, depth) for leaf in leaves]
    if len({parameter.stack for parameter in parameters}) > 1:  # their stacks are cut differently

        def only(i: int) -> Read:
            return lambda position, block: [read(position, block)[i]]

        return [fill([leaf], depth, only(i), axis, pool, cut=cut)[0] for i, leaf in enumerate(leaves)]
    for offset in np.ndindex(parameters[0].stack):
        wanted: dict[Position, list[tuple[int, Block, np.ndarray]]] = {}
        for i, parameter in enumerate(parameters):
            for position, block, out in parameter.pieces(offset):
                wanted.setdefault(position, []).append((i, block, out))
        cuts = [
            (position, box, places)
            for position, places in wanted.items()
            for box in (_cuts(places, axis, cut) if axis is not None else (None,))
        ]
        for _ in pool.map(lambda cut: _read_cut(read, *cut), cuts):
            pass
        for parameter in parameters:
            parameter.written(offset)
    return [parameter.array() for parameter in parameters]


class _Buffers:
    """A parameter whose shards are filled in host memory and then handed to their devices.

    Attributes:
      stack: sizes of a shard's stacked axes.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, depth: int):
        self._leaf, self._depth, self._devices = leaf, depth, _local_blocks(leaf)
        self._buffers = {block: _memory(_sizes(block), leaf.dtype) for block in set(self._devices.values())}
        self.stack = _sizes(next(iter(self._buffers))[:depth])

    def pieces(self, offset: Position) -> Iterator[tuple[Position, Block, np.ndarray]]:
        """Of every shard, for this place in its stack: the position, the block there, and what is to be written."""
        for block, buffer in self._buffers.items():
            yield _position(block, offset), block[self._depth :], buffer[(*offset, ...)]

    def written(self, offset: Position) -> None:
        """Everything at `offset` is there."""
        del offset

    def array(self) -> jax.Array:
        """The parameter; a CPU device takes the buffers over."""
        return jax.block_until_ready(_assembled(self._leaf, self._leaf.shape, self._devices, self._buffers))


class _OnDevices:
    """A stack that lies on its devices from the start, and of which the host has one place at a time.

    Attributes:
      stack: sizes of a shard's stacked axes.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, depth: int):
        self._leaf, self._depth, self._devices = leaf, depth, _local_blocks(leaf)
        self.stack = _sizes(next(iter(self._devices.values()))[:depth])
        # Each shard has one place of its stack in the array that is written into it.
        places = (size // local for size, local in zip(leaf.shape, self.stack, strict=False))
        self._piece_shape = (*places, *leaf.shape[depth:])
        self._array = _zeros(leaf.shape, leaf.dtype, leaf.sharding)()
        # Written anew for every offset: JAX lets go of an array on the host only when it is called again.
        self._pieces = {
            block: np.empty((*(1 for _ in self.stack), *_sizes(block[depth:])), leaf.dtype)
            for block in set(self._devices.values())
        }

    def pieces(self, offset: Position) -> Iterator[tuple[Position, Block, np.ndarray]]:
        """As of `_Buffers`, in the same memory at every offset."""
        for block, piece in self._pieces.items():
            yield _position(block, offset), block[self._depth :], piece[(*(0 for _ in offset), ...)]

    def written(self, offset: Position) -> None:
        """Sends what was written to the devices, and waits for it, so that the memory may be written again."""
        piece = _assembled(self._leaf, self._piece_shape, self._devices, self._pieces)
        self._array = _writer(self._leaf.sharding)(self._array, piece, np.asarray(offset, np.int32))
        jax.block_until_ready(self._array)

    def array(self) -> jax.Array:
        """The parameter."""
        return self._array


def _in_host_memory(leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether the devices of a parameter are CPUs, or it has a sharding that is not one of a mesh."""
    if leaf.sharding is None:
        return jax.devices()[0].platform == "cpu"  # where an array without a sharding goes
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return on_cpu or not isinstance(leaf.sharding, NamedSharding)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A program that makes an array where it is to lie."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _writer(sharding: NamedSharding | None) -> Any:
    """A program that writes each shard of one array into the same shard of another, at an offset of its stack."""

    def write(stack: jax.Array, piece: jax.Array, offset: jax.Array) -> jax.Array:
        rest = (0,) * (stack.ndim - len(offset))
        return jax.lax.dynamic_update_slice(stack, piece, (*offset, *rest))

    if sharding is not None:
        spec = sharding.spec
        write = jax.shard_map(write, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    return jax.jit(write, donate_argnums=0)


def _assembled(
    leaf: jax.ShapeDtypeStruct, shape: Sequence[int], devices: dict[Any, Block], shards: dict[Block, np.ndarray]
) -> jax.Array:
    if leaf.sharding is None:
        (whole,) = shards.values()
        return jax.device_put(whole)
    arrays = [jax.device_put(shards[block], device) for device, block in devices.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), leaf.sharding, arrays)


def _local_blocks(leaf: jax.ShapeDtypeStruct) -> dict[Any, Block]:
    """What every device of this process holds of a parameter; under None what the default device holds."""
    if leaf.sharding is None:
        return {None: tuple(map(range, leaf.shape))}
    return {
        device: tuple(range(*part.indices(size)) for part, size in zip(index or (), leaf.shape, strict=True))
        for device, index in leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).items()
    }


def _memory(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Whole pages, which a CPU device takes over; NumPy's own begin between XLA's alignments.

    Nor does it ask for huge pages, as NumPy does: to find these cost ten times what the copies did.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return (
        np.frombuffer(mmap.mmap(-1, max(1, size), access=mmap.ACCESS_COPY), np.uint8, size).view(dtype).reshape(shape)
    )


def _position(block: Block, offset: Position) -> Position:
    return tuple(part[place] for part, place in zip(block, offset, strict=False))


def _sizes(block: Block) -> tuple[int, ...]:
    return tuple(map(len, block))


def _cuts(places: Iterable[tuple[int, Block, np.ndarray]], axis: int, cut: bool) -> Iterator[Block]:
    """The blocks to be read so that every place gets its own, and none twice."""
    blocks = {block for _, block, _ in places}
    itemsize = max(out.itemsize for _, _, out in places)
    edges = sorted({edge for block in blocks for edge in (block[axis].start, block[axis].stop)})
    for start, stop in itertools.pairwise(edges):
        inside = [block for block in blocks if block[axis].start <= start and stop <= block[axis].stop]
        if not inside:
            continue
        box = [
            range(min(part.start for part in parts), max(part.stop for part in parts))
            for parts in zip(*inside, strict=True)
        ]
        others = math.prod(len(part) for i, part in enumerate(box) if i != axis)
        rows = max(_MIN_ROWS, CUT_BYTES // max(1, others * itemsize)) if cut else stop - start
        for first in range(start, stop, rows):
            yield (*box[:axis], range(first, min(first + rows, stop)), *box[axis + 1 :])


def _read_cut(read: Read, position: Position, box: Block | None, places: list[tuple[int, Block, np.ndarray]]) -> None:
    """Reads one cut, and copies it to all that want some of it."""
    values = read(position, box)
    for i, block, out in places:
        origin = tuple(map(range, np.shape(values[i]))) if box is None else box
        common = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(origin, block, strict=True)]
        if all(common):
            _copy(out[_within(common, block)], np.asarray(values[i])[_within(common, origin)])


def _within(block: Sequence[range], outer: Block) -> tuple[Any, ...]:
    """The index of a block in an array that begins where `outer` does; a view also where there are no axes."""
    parts = zip(block, outer, strict=True)
    return (*(slice(part.start - whole.start, part.stop - whole.start) for part, whole in parts), ...)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """Writes `values` into `out`, cast, in cuts along the rows in which the values lie."""
    if values.ndim == 0:
        out[...] = values
        return
    bits = np.dtype(f"u{out.itemsize}")  # NumPy copies numbers of its own faster, and beside other threads
    axis = int(np.argmax(np.abs(values.strides)))
    count = values.shape[axis]
    rows = max(_MIN_ROWS, CUT_BYTES * count // (values.size * out.itemsize))
    for first in range(0, count, rows):
        cut = (*(slice(None),) * axis, slice(first, first + rows))
        part = values[cut].astype(out.dtype, order="K", copy=False)
        np.copyto(out[cut].view(bits), part.view(bits))
