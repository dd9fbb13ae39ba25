"""The parameters of a run, for another run, for generation or for export.

Where a run keeps moving averages (`ema`) they are read in place of the parameters, and adapters (`params/lora`) are
merged into their kernels.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.adapter import LORA, A, B, LoraSettings, merged
from vlm_jax.checkpoints.arrays import open_arrays
from vlm_jax.checkpoints.checksums import HostSum, array_checksums, described, differing
from vlm_jax.checkpoints.hub import MAP_FILE, PARAMS, LazyTensor
from vlm_jax.checkpoints.orbax import absolute_folder, newest_arrays
from vlm_jax.checkpoints.verification import (
    CheckpointError,
    Checksums,
    check_stored,
    damaged,
    few,
    first_line,
    stored_dtypes,
    stored_shapes,
)
from vlm_jax.config import parse, read_json
from vlm_jax.leaves import flatten
from vlm_jax.types import Fields, Selection, Tree

EMA = "ema"
Shapes = Mapping[str, tuple[int, ...]]


def read_parts(directory: epath.PathLike, parts: Fields) -> Fields:
    """Reads some parts of the newest checkpoint of another run, or of a release.

    Args:
      directory: that run's checkpoint directory, or a folder of Orbax arrays converted from a release.
      parts: {part: pytree of `jax.ShapeDtypeStruct` with shardings}.

    Raises:
      CheckpointError: there is no checkpoint, or its parts are of another model.
    """
    directory = absolute_folder(directory)
    leaves = dict(flatten(parts))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if (directory / MAP_FILE).exists():
        check_stored(directory / PARAMS, shapes, parts)
        return _tree(_restored(directory / PARAMS, leaves), parts)
    state, checksums = newest_arrays(directory)
    check_stored(state, {f"{PARAMS}/{path}": shape for path, shape in shapes.items()}, [f"{PARAMS}/{p}" for p in parts])
    stored = stored_shapes(state)
    adapters = {path: shape for path, shape in _adapters(stored).items() if path.split("/")[1] in parts}
    for path, shape in adapters.items():
        like = leaves[_kernel(path)]
        sharding = like.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        leaves[path] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    named = {path: _stored_name(path, stored) for path in leaves}
    found = _verified(state, {named[path]: leaf for path, leaf in leaves.items()}, checksums)
    values = {path: found[named[path]] for path in leaves}
    params = _tree(values, parts)
    if not adapters:
        return params
    return merged(
        params | {LORA: unflatten_dict({path.removeprefix(f"{LORA}/"): values[path] for path in adapters}, sep="/")},
        lora_settings(directory),
    )


def open_run(directory: epath.PathLike, shapes: Shapes) -> dict[str, LazyTensor]:
    """The parameters of a run's newest checkpoint by path, read when they are indexed.

    Args:
      directory: the run's checkpoint directory.
      shapes: of the parameters, by path.

    Raises:
      CheckpointError: there is no checkpoint.
      CheckpointFileError: it lacks these parameters.
    """
    directory = absolute_folder(directory)
    state, checksums = newest_arrays(directory)
    stored = stored_shapes(state)
    adapters = {path: shape for path, shape in _adapters(stored).items() if _kernel(path) in shapes}
    wanted = {_stored_name(path, stored): shape for path, shape in {**shapes, **adapters}.items()}
    opened = _opened(state, wanted, checksums)
    found = {path: opened[_stored_name(path, stored)] for path in shapes}
    settings = lora_settings(directory) if adapters else None
    for path in adapters:
        if path.endswith(f"/{A}") and settings is not None:
            other = f"{path.removesuffix(A)}{B}"
            factors = opened[_stored_name(path, stored)], opened[_stored_name(other, stored)]
            found[_kernel(path)] = _added(found[_kernel(path)], *factors, settings.scale)
    return found


def open_adapters(directory: epath.PathLike) -> tuple[dict[str, np.ndarray], LoraSettings]:
    """The adapters of a run's newest checkpoint, by path without the part's name, and their settings.

    Raises:
      CheckpointError: there is no checkpoint, or the run has no adapters.
    """
    directory = absolute_folder(directory)
    state, checksums = newest_arrays(directory)
    stored = stored_shapes(state)
    adapters = _adapters(stored)
    if not adapters:
        raise CheckpointError(f"{directory}: this run has no adapters; train with config.lora, or export it whole")
    wanted = {_stored_name(path, stored): shape for path, shape in adapters.items()}
    opened = _opened(state, wanted, checksums)
    values = {path.removeprefix(f"{LORA}/"): np.asarray(opened[_stored_name(path, stored)]) for path in adapters}
    return values, lora_settings(directory)


def lora_settings(directory: epath.PathLike) -> LoraSettings:
    """`config.lora` of the run with this checkpoint directory.

    Raises:
      CheckpointError: the run's config is missing.
    """
    path = absolute_folder(directory).parent / "config.json"
    return parse(LoraSettings, read_json(path, CheckpointError).get(LORA, {}), f"{path}: {LORA}")


def _adapters(stored: Shapes) -> dict[str, tuple[int, ...]]:
    start = f"{PARAMS}/"
    return {path.removeprefix(start): shape for path, shape in stored.items() if path.startswith(f"{start}{LORA}/")}


def _kernel(path: str) -> str:
    """The kernel of an adapter's factor."""
    return path.removeprefix(f"{LORA}/").rpartition("/")[0] + "/kernel"


def _stored_name(path: str, stored: Shapes) -> str:
    return f"{EMA}/{path}" if f"{EMA}/{path}" in stored else f"{PARAMS}/{path}"


def _added(kernel: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    """The kernel with the product of its adapter, in float32."""

    def read(index: Selection) -> np.ndarray:
        whole = (slice(None),)
        first, last = ((...,), (...,)) if index is ... else ((*index[:-1], *whole), (*index[:-2], *whole, index[-1]))
        product = np.asarray(a[...])[first] @ np.asarray(b[...])[last]
        return kernel[index].astype(np.float32) + np.float32(scale) * product

    return LazyTensor(kernel.shape, np.float32, read, by_rows=kernel.by_rows)


def _opened(state: epath.Path, shapes: Shapes, checksums: Checksums | None) -> dict[str, LazyTensor]:
    """Arrays by stored path, each compared with its checksum before the first of it is read."""
    opened = open_arrays(state, shapes)
    if checksums is None:
        return opened
    return {path: _compared(tensor, path, state, checksums) for path, tensor in opened.items()}


def _compared(tensor: LazyTensor, path: str, state: epath.Path, checksums: Checksums) -> LazyTensor:
    @functools.cache
    def compare() -> None:
        total = HostSum().add(tensor[...])  # once: every part of it would decode whole chunks again
        if lines := list(differing(checksums, {path: described(tensor, total.value)})):
            raise damaged(state, few(lines))

    def read(index: Selection) -> np.ndarray:
        compare()
        return tensor[index]

    return LazyTensor(tensor.shape, tensor.dtype, read, by_rows=tensor.by_rows)


def _verified(state: epath.Path, leaves: Mapping[str, Tree], checksums: Checksums | None) -> dict[str, jax.Array]:
    """As `_restored`, with the checksums compared before an array is cast."""
    if checksums is None:
        return _restored(state, leaves)
    dtypes = stored_dtypes(state)
    stored = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path], sharding=leaf.sharding) for path, leaf in leaves.items()
    }
    found = _restored(state, stored)
    if lines := list(differing(checksums, array_checksums(found))):
        raise damaged(state, few(lines))
    return {path: found[path].astype(leaf.dtype) for path, leaf in leaves.items()}


def _restored(state: epath.Path, leaves: Mapping[str, Tree]) -> dict[str, jax.Array]:
    """Arrays by stored path."""
    like = unflatten_dict(leaves, sep="/")
    restore_args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), like)
    arguments = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return dict(flatten(reader.restore(state, args=arguments)))
    except Exception as error:
        raise CheckpointError(f"{state} cannot be read: {first_line(error)}") from error


def _tree(values: Mapping[str, jax.Array], like: Tree) -> Tree:
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [values[path] for path, _ in flatten(like)])
