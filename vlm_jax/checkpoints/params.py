"""Import of parameters from a release, and export to a release, by a table of rules."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints import placement
from vlm_jax.checkpoints.plan import Step, export_plan, plan
from vlm_jax.checkpoints.rules import Rule, SourceTensor, matching
from vlm_jax.leaves import flatten
from vlm_jax.types import Dtype, Params, Tree


def import_params(
    rules: Iterable[Rule],
    source: Mapping[str, SourceTensor],
    targets: Tree,
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> Params:
    """Reads a released checkpoint into a tree of parameters.

    Tensors are read one at a time, in parts, and only the parts on the devices of this process where the
    operation allows it; in addition to the parameters the host holds at most one tensor: see `placement`.

    Args:
      rules: the table.
      source: the checkpoint.
      targets: a tree of `jax.ShapeDtypeStruct`; one without a sharding is put on the default device.
      ignore: source keys that may be unused, as in `plan`.
      keep: targets that are not read, as in `plan`.

    Returns:
      The tree of `targets` with `jax.Array`s on their devices, cast to the dtypes of the targets. Leaves that `keep`
      matches are unchanged.

    Raises:
      CheckpointMismatch: as in `plan`, before anything is read.
    """
    steps = plan(rules, source, targets, ignore=ignore, keep=keep)
    leaves = dict(flatten(targets))
    kept = {path for path in leaves if matching(keep, path)}
    values = dict(leaves)
    with placement.readers() as pool:
        for step in steps:
            wanted = [i for i, path in enumerate(step.targets) if path not in kept]
            read, axis = _reader(step, source, wanted)
            paths = [step.targets[i] for i in wanted]
            shapes = [_shape_of(leaves[path]) for path in paths]
            cut = all(getattr(source[key], "by_rows", True) for keys in step.sources.values() for key in keys)
            filled = placement.fill(shapes, len(step.rule.stacked), read, axis, pool, cut=cut)
            values |= zip(paths, filled, strict=True)
    structure = jax.tree_util.tree_structure(targets)
    return jax.tree_util.tree_unflatten(structure, [values[path] for path in leaves])


def export_params(rules: Iterable[Rule], params: Params, *, dtype: Dtype = None) -> dict[str, np.ndarray]:
    """Writes a tree of parameters under the released names: the inverse of `import_params`.

    Args:
      rules: the table of the import.
      params: arrays; each must be fully addressable by this process.
      dtype: dtype of floating-point tensors; None keeps the dtype of each.

    Returns:
      Released key -> tensor, views of the parameters on the host where the operation allows it.

    Raises:
      CheckpointMismatch: a parameter has no rule or two rules, its shape does not fit its rule,
        or two rules write the same key.
    """
    leaves = dict(flatten(params))
    steps = export_plan(rules, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    tensors = {}
    for step in steps:
        arrays = [np.asarray(leaves[path]) for path in step.targets]
        for position, keys in step.sources.items():
            parts = step.rule.op.inverse(*(np.asarray(array[position]) for array in arrays))
            for key, part in zip(keys, parts, strict=True):
                cast = dtype is not None and jnp.issubdtype(part.dtype, jnp.floating)
                tensors[key] = part.astype(dtype) if cast else part
    return tensors


def block_reader(
    step: Step, i: int, source: Mapping[str, SourceTensor], dtype: Dtype
) -> Callable[[tuple[range, ...]], np.ndarray]:
    """A function that reads a block of the step's target `i`, given as one range of step 1 per axis."""
    depth = len(step.rule.stacked)
    read_at, axis = _reader(step, source, [i])

    def read(block: tuple[range, ...]) -> np.ndarray:
        stack, rest = block[:depth], block[depth:]
        values = np.empty([len(r) for r in block], dtype)
        for offset in np.ndindex(*(len(r) for r in stack)):
            position = tuple(r[o] for r, o in zip(stack, offset, strict=True))
            if axis is None:
                values[offset] = read_at(position, None)[0][tuple(slice(r.start, r.stop) for r in rest)]
            else:
                values[offset] = read_at(position, rest)[0]
        return values

    return read


def _reader(step: Step, source: Mapping[str, SourceTensor], wanted: Sequence[int]) -> tuple[placement.Read, int | None]:
    """A reader of blocks of a step's `wanted` targets, and their axis along which the tensor's rows are.

    The axis is None where tensors are only read whole: there are several, or the operation cannot locate
    a block of the target in the tensor.
    """
    op, rank = step.rule.op, len(step.shapes[0]) - len(step.rule.stacked)
    corner = op.source_index(tuple(slice(i, i + 1) for i in range(rank)))
    if len(step.rule.sources) > 1 and len(step.rule.targets) > 1:
        corner = None
    return functools.partial(_read, step, source, wanted), corner[0].start if corner else None


def _read(
    step: Step,
    source: Mapping[str, SourceTensor],
    wanted: Sequence[int],
    position: placement.Position,
    block: placement.Block | None,
) -> list[np.ndarray]:
    """A block of the `wanted` targets of one position of a step, or the whole of them."""
    op, keys = step.rule.op, step.sources[position]
    if block is None:
        made = op(*(np.asarray(source[key][...]) for key in keys))
    else:
        part = op.source_index(tuple(slice(r.start, r.stop) for r in block))
        made = op(*[np.asarray(source[keys[0]][part])] * len(keys))  # stored several times, read once
    return [made[i] for i in wanted]


def _shape_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
