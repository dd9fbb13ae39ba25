"""Copies parameters from released tensors to their devices, a piece at a time.

A tensor is read in pieces ("cuts") of about a mebibyte along its rows, by several threads. A cut is cast and copied
into every shard that includes a part of it, so that each byte is read once for any sharding.

On a CPU device memory is host memory: a shard is one host buffer, which becomes the device's array without a
copy. Elsewhere a stack of layers is allocated on its devices and filled there layer by layer, and the host holds
one entry of the stack: at most one tensor of the release, or one per part of a stack that is split.
"""

import functools
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.types import Dtype, Selection

Block = tuple[range, ...]  # one range per axis
Position = tuple[int, ...]  # in a stack of layers
Read = Callable[[Position, Block | None], Sequence[np.ndarray]]

CUT_BYTES = 2**20  # a cut and the cache lines of its transpose fit in a core's cache
_MIN_ROWS = 32  # so that a transposed row is a cache line


def readers() -> ThreadPoolExecutor:
    """The threads that read and copy cuts; few, because they are bound by memory bandwidth."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="read")


def fill(
    leaves: Sequence[jax.ShapeDtypeStruct], depth: int, read: Read, axis: int | None, pool: Executor, *, cut: bool
) -> list[jax.Array]:
    """The parameters that come from the same tensors, on their devices.

    Args:
      leaves: shape, dtype and sharding of each; those without a sharding are put on the default device, uncommitted.
      depth: number of leading stacked axes of each.
      read: given a position in the stack and a block of the other axes, the block of every parameter, in any
        dtype; given None for the block, all of each.
      axis: of the axes after the stacked ones, the one along the rows of the single tensor; None where
        tensors are only read whole.
      pool: runs reads and copies.
      cut: whether blocks are read in cuts, or as a whole.
    """
    parameters = [(_OnDevices if depth and not _in_host_memory(leaf) else _Buffers)(leaf, depth) for leaf in leaves]
    if len({parameter.stack for parameter in parameters}) > 1:  # their stacks are sharded differently

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
    """A parameter whose shards are filled in host memory and then moved to their devices.

    Attributes:
      stack: sizes of a shard's stacked axes.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, depth: int):
        self._leaf, self._depth, self._devices = leaf, depth, _local_blocks(leaf)
        self._buffers = {block: _memory(_sizes(block), leaf.dtype) for block in set(self._devices.values())}
        self.stack = _sizes(next(iter(self._buffers))[:depth])

    def pieces(self, offset: Position) -> Iterator[tuple[Position, Block, np.ndarray]]:
        """For every shard, at this offset in its stack: the position, its block, and the array to write."""
        for block, buffer in self._buffers.items():
            yield _position(block, offset), block[self._depth :], buffer[(*offset, ...)]

    def written(self, offset: Position) -> None:
        """Called when everything at `offset` is written."""
        del offset

    def array(self) -> jax.Array:
        """The parameter; a CPU device adopts the buffers."""
        return jax.block_until_ready(_assembled(self._leaf, self._leaf.shape, self._devices, self._buffers))


class _OnDevices:
    """A stack allocated on its devices; the host holds one entry at a time.

    Attributes:
      stack: sizes of a shard's stacked axes.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, depth: int):
        self._leaf, self._depth, self._devices = leaf, depth, _local_blocks(leaf)
        self.stack = _sizes(next(iter(self._devices.values()))[:depth])
        # Each shard has one entry of its stack in the host array.
        places = (size // local for size, local in zip(leaf.shape, self.stack, strict=False))
        self._piece_shape = (*places, *leaf.shape[depth:])
        self._array = _zeros(leaf.shape, leaf.dtype, leaf.sharding)()
        # Reused for every offset: JAX frees an array on the host only when it is called again.
        self._pieces = {
            block: np.empty((*(1 for _ in self.stack), *_sizes(block[depth:])), leaf.dtype)
            for block in set(self._devices.values())
        }

    def pieces(self, offset: Position) -> Iterator[tuple[Position, Block, np.ndarray]]:
        """As in `_Buffers`, in the same memory at every offset."""
        for block, piece in self._pieces.items():
            yield _position(block, offset), block[self._depth :], piece[(*(0 for _ in offset), ...)]

    def written(self, offset: Position) -> None:
        """Copies the host array to the devices, and waits, so that the memory can be reused."""
        piece = _assembled(self._leaf, self._piece_shape, self._devices, self._pieces)
        self._array = _writer(self._leaf.sharding)(self._array, piece, np.asarray(offset, np.int32))
        jax.block_until_ready(self._array)

    def array(self) -> jax.Array:
        """The parameter."""
        return self._array


def _in_host_memory(leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether the devices of a parameter are CPUs, or it has a sharding that is not one of a mesh."""
    if leaf.sharding is None:
        return jax.devices()[0].platform == "cpu"  # the device of arrays without a sharding
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return on_cpu or not isinstance(leaf.sharding, NamedSharding)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Dtype, sharding: NamedSharding | None) -> Callable[[], jax.Array]:
    """A jitted function that creates an array with a sharding."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _writer(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """A jitted function that writes each shard of one array into the same shard of a stack, at an offset."""

    def write(stack: jax.Array, piece: jax.Array, offset: jax.Array) -> jax.Array:
        rest = (0,) * (stack.ndim - len(offset))
        return jax.lax.dynamic_update_slice(stack, piece, (*offset, *rest))

    if sharding is not None:
        spec = sharding.spec
        write = jax.shard_map(write, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    return jax.jit(write, donate_argnums=0)


def _assembled(
    leaf: jax.ShapeDtypeStruct, shape: Sequence[int], devices: dict[object, Block], shards: dict[Block, np.ndarray]
) -> jax.Array:
    if leaf.sharding is None:
        (whole,) = shards.values()
        return jax.device_put(whole)
    arrays = [jax.device_put(shards[block], device) for device, block in devices.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), leaf.sharding, arrays)


def _local_blocks(leaf: jax.ShapeDtypeStruct) -> dict[object, Block]:
    """The block of a parameter on every device of this process; under None that of the default device."""
    if leaf.sharding is None:
        return {None: tuple(map(range, leaf.shape))}
    return {
        device: tuple(range(*part.indices(size)) for part, size in zip(index or (), leaf.shape, strict=True))
        for device, index in leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).items()
    }


def _memory(shape: tuple[int, ...], dtype: Dtype) -> np.ndarray:
    """Page-aligned memory, which a CPU device can adopt; NumPy's memory is not aligned for XLA.

    Without huge pages, which NumPy requests: allocating them took ten times as long as the copies.
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
    """The blocks to read so that every place is filled, without reading any twice."""
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
    """Reads one cut, and copies it to all places that overlap it."""
    values = read(position, box)
    for i, block, out in places:
        origin = tuple(map(range, np.shape(values[i]))) if box is None else box
        common = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(origin, block, strict=True)]
        if all(common):
            _copy(out[_within(common, block)], np.asarray(values[i])[_within(common, origin)])


def _within(block: Sequence[range], outer: Block) -> Selection:
    """The index of a block in an array that starts at `outer`; a view also for arrays without axes."""
    parts = zip(block, outer, strict=True)
    return (*(slice(part.start - whole.start, part.stop - whole.start) for part, whole in parts), ...)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """Casts `values` and writes them into `out`, in cuts along the rows of the values."""
    if values.ndim == 0:
        out[...] = values
        return
    bits = np.dtype(f"u{out.itemsize}")  # NumPy copies native dtypes faster, and releases the GIL
    axis = int(np.argmax(np.abs(values.strides)))
    count = values.shape[axis]
    rows = max(_MIN_ROWS, CUT_BYTES * count // (values.size * out.itemsize))
    for first in range(0, count, rows):
        cut = (*(slice(None),) * axis, slice(first, first + rows))
        part = values[cut].astype(out.dtype, order="K", copy=False)
        np.copyto(out[cut].view(bits), part.view(bits))
