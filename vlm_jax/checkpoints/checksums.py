"""Checksums of arrays, of small JSON objects, and of the files of a folder.

The checksum of an array is a sum over its elements modulo 2^32, so it does not depend on the mesh: the devices of all
hosts add up their shards, and a checkpoint saved on one mesh is verified on any other. A change of one element always
changes it; any other change goes unnoticed with a probability of 2^-32.

Source: the finalizer of MurmurHash3, https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp (`fmix32`).
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.types import Fields, Tree

FILES = "files.json"  # in a folder: its other files
CRC = "crc32"  # key of a JSON object for the checksum of its other keys
WHOLE_BYTES = 2**20  # files up to this size have a checksum in FILES; larger ones hold arrays, which have their own
_BLOCK = 2**16  # elements whose temporary arrays fit in a core's cache


class DamagedFile(ValueError):
    """A file that is not as it was written; the message names it, with what was expected and found."""


def array_checksums(arrays: Mapping[str, Tree]) -> dict[str, str]:
    """The dtype, shape and checksum of each array, as "float32 (2, 3) 0a1b2c3d", by its name.

    Args:
      arrays: JAX or NumPy arrays. Of arrays that are on several hosts, all processes call this alike.
    """
    on_host = {name: x for name, x in arrays.items() if _in_host_memory(x)}
    others = {name: x for name, x in arrays.items() if name not in on_host}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="checksum") as pool:
        sums = dict(zip(on_host, pool.map(lambda x: HostSum().add(np.asarray(x)).value, on_host.values()), strict=True))
    if others:
        meshes = [x.sharding.mesh for x in others.values() if isinstance(x.sharding, NamedSharding)]
        out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
        found = jax.jit(_device_sums, out_shardings=out)(list(others.values()))
        sums |= dict(zip(others, np.asarray(found).tolist(), strict=True))
    return {name: described(x, sums[name]) for name, x in arrays.items()}


def merged_checksums(arrays: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    """Checksums of arrays on several hosts, which a sum with zeros does not change; all processes call this alike.

    Zeros have no sign, values too small for a normal number count as zeros, since XLA takes them as such on CPUs and
    TPUs, and all NaNs are the same.

    Args:
      arrays: on the mesh.
      mesh: of the result, a uint32 for each array, on all devices.
    """
    return jax.jit(_merged_sums, out_shardings=NamedSharding(mesh, PartitionSpec()))(list(arrays))


def described(array: Any, checksum: int) -> str:
    """The text of an array's dtype, shape and checksum."""
    return f"{np.dtype(array.dtype)} {tuple(array.shape)} {checksum:08x}"


class HostSum:
    """The checksum of an array that is given in pieces, in order."""

    def __init__(self):
        self.value, self._count = 0, 0

    def add(self, values: np.ndarray) -> "HostSum":
        """Adds the next elements, in the order of C."""
        words = _words(values)
        for first in range(0, words.size, _BLOCK):
            block = words[first : first + _BLOCK].astype(np.uint32)
            index = np.arange(block.size, dtype=np.uint32) + np.asarray([self._count % 2**32], np.uint32)
            mixed = _mixed(block, index)
            self.value = (self.value + int(mixed.sum(dtype=np.uint64))) % 2**32
            self._count += block.size
        return self


def _in_host_memory(array: Tree) -> bool:
    """Whether the array is NumPy's, or on CPUs of this process: no program is compiled for it."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.sharding.device_set)


def _device_sums(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([_device_sum(array) for array in arrays])


def _merged_sums(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([_device_sum(array, is_merged=True) for array in arrays])


def _device_sum(array: jax.Array, *, is_merged: bool = False) -> jax.Array:
    size = array.dtype.itemsize
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint8)
    else:
        bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    if is_merged and jnp.issubdtype(array.dtype, jnp.floating):
        bits = _canonical(bits, array.dtype)
    if bits.ndim == 0:
        bits = bits[None]
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    return jnp.sum(_mixed(bits.astype(jnp.uint32), index), dtype=jnp.uint32)


def _canonical(bits: jax.Array, dtype: Any) -> jax.Array:
    """Bits of floating-point numbers, with one zero and one NaN."""
    fraction = jnp.finfo(dtype).nmant
    sign, kind = 1 << (8 * np.dtype(dtype).itemsize - 1), bits.dtype.type
    infinity = kind(sign - (1 << fraction))
    exponent, rest = bits & infinity, bits & kind((1 << fraction) - 1)
    bits = jnp.where(exponent == 0, kind(0), bits)
    return jnp.where((exponent == infinity) & (rest != 0), infinity | kind(1), bits)


def _words(values: np.ndarray) -> np.ndarray:
    """The bits of an array as one axis of unsigned integers of its width; those of 8 bytes are two of 4."""
    values = np.ascontiguousarray(values).reshape(-1)
    return values.view({1: np.uint8, 2: np.uint16}.get(values.dtype.itemsize, np.uint32))


def _mixed(bits: Any, index: Any) -> Any:
    """A pseudo-random number of 32 bits for each pair; for one index, a permutation of the bits."""
    x = bits ^ (index * np.uint32(0x9E3779B1))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def sealed(content: Fields) -> Fields:
    """A JSON object with its checksum, under the key `CRC`."""
    return {**content, CRC: _crc_of(content)}


def unsealed(content: Any, path: epath.PathLike) -> Fields:
    """A JSON object without its checksum.

    Raises:
      DamagedFile: it has another checksum, or none.
    """
    if not isinstance(content, dict) or CRC not in content:
        raise DamagedFile(f"{path}: expected a JSON object with a key {CRC}")
    inner = {key: value for key, value in content.items() if key != CRC}
    if (found := _crc_of(inner)) != content[CRC]:
        raise DamagedFile(f"{path}: expected the checksum {content[CRC]}, found {found}")
    return inner


def read_object(path: epath.PathLike) -> Any:
    """The JSON in a file.

    Raises:
      DamagedFile: the file is missing, or it is not JSON.
      OSError: it cannot be read.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFile(f"{path}: is missing") from None
    except (ValueError, RecursionError) as error:  # also for bytes that are not text
        raise DamagedFile(f"{path}: is not JSON ({error})") from error


def list_files(folder: epath.PathLike) -> None:
    """Writes `FILES` into a folder: the sizes of its files, and checksums of the small ones."""
    folder = epath.Path(folder)
    found = {}
    for name, path in _files(folder):
        size = path.stat().length
        found[name] = [size, _crc(path.read_bytes()) if size <= WHOLE_BYTES else None]
    (folder / FILES).write_text(json.dumps(sealed({"files": found})))


def check_files(folder: epath.PathLike) -> None:
    """Compares a folder with its `FILES`; files that this does not list are ignored.

    Raises:
      DamagedFile: a file is missing or has another size or checksum; the message names it, with both.
      OSError: a file cannot be read.
    """
    folder = epath.Path(folder)
    for name, (size, crc) in unsealed(read_object(folder / FILES), folder / FILES)["files"].items():
        path = folder / name
        if not path.exists():
            raise DamagedFile(f"{path}: is missing")
        if (found := path.stat().length) != size:
            raise DamagedFile(f"{path}: expected {size:,} bytes, found {found:,}")
        if crc is not None and (found := _crc(path.read_bytes())) != crc:
            raise DamagedFile(f"{path}: expected the checksum {crc}, found {found}")


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """Lines about the arrays whose `array_checksums` differ."""
    for name, text in found.items():
        if expected.get(name) != text:
            yield f"{name}: expected {expected.get(name, 'no such array')}, found {text}"


def _files(folder: epath.Path, before: str = "") -> Iterable[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{before}{path.name}/")
        elif before or path.name != FILES:
            yield f"{before}{path.name}", path


def _crc_of(content: Fields) -> str:
    return _crc(json.dumps(content, sort_keys=True).encode())


def _crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
