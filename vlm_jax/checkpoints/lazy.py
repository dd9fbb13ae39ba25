"""Lazy conversion by a table of rules: parameters from a release, a release from parameters."""

import itertools
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.hub import LazyTensor
from vlm_jax.checkpoints.ops import Index, Shape
from vlm_jax.checkpoints.params import block_reader
from vlm_jax.checkpoints.plan import Step
from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.types import Config, Dtype, Selection


def lazy_params(
    steps: Iterable[Step], source: Mapping[str, SourceTensor], *, dtype: Dtype = None
) -> dict[str, LazyTensor]:
    """The parameters converted from a release; reading one reads its tensors.

    Args:
      steps: of `plan.plan` for the release.
      source: the release.
      dtype: dtype of floating-point parameters; None keeps that of their tensors, or the
        smallest that represents all of them.
    """
    params = {}
    for step in steps:
        keys = itertools.chain.from_iterable(step.sources.values())
        stored = _promoted({np.dtype(source[key].dtype) for key in keys})
        stored = cast_dtype(stored, dtype)
        for i, path in enumerate(step.targets):
            shape = step.shapes[i]
            params[path] = LazyTensor(shape, stored, _param_reader(block_reader(step, i, source, stored), shape))
    return params


def lazy_release(steps: Iterable[Step], params: Mapping[str, SourceTensor], dtypes: Config) -> dict[str, LazyTensor]:
    """The released tensors converted from parameters; reading one reads its part of the parameters.

    Args:
      steps: of `plan.export_plan` for the parameters.
      params: by path.
      dtypes: dtypes of the released tensors by key; a parameter's own where a key is missing.
    """
    tensors = {}
    for step in steps:
        own = params[step.targets[0]].dtype
        for position, keys in step.sources.items():
            for i, (key, shape) in enumerate(zip(keys, step.needed, strict=True)):
                dtype = np.dtype(dtypes.get(key, own))
                tensors[key] = LazyTensor(shape, dtype, _released_reader(step, position, i, params, dtype))
    return tensors


def cast_dtype(stored: Dtype, dtype: Dtype) -> np.dtype:
    """`dtype` if it is given and the stored dtype is floating-point; else the stored dtype."""
    wanted = dtype is not None and jnp.issubdtype(stored, jnp.floating)
    return np.dtype(dtype if wanted else stored)


def cast(tensor: LazyTensor, dtype: Dtype) -> LazyTensor:
    """The tensor, cast to `dtype` if it is floating-point; unchanged where `dtype` is None."""
    wanted = cast_dtype(tensor.dtype, dtype)
    return LazyTensor(tensor.shape, wanted, lambda index: tensor[index].astype(wanted, copy=False))


def _promoted(dtypes: set[np.dtype]) -> np.dtype:
    first, *rest = sorted(dtypes, key=str)
    for other in rest:
        first = jnp.promote_types(first, other)
    return np.dtype(first)


def _param_reader(read: Callable[[tuple[range, ...]], np.ndarray], shape: Shape) -> Callable[[Selection], np.ndarray]:
    return lambda index: read(tuple(range(*s.indices(n)) for s, n in zip(_slices(index, shape), shape, strict=True)))


def _released_reader(
    step: Step, position: tuple[int, ...], i: int, params: Mapping[str, SourceTensor], dtype: np.dtype
) -> Callable[[Selection], np.ndarray]:
    """A function that reads a block of the step's released tensor `i` at one position of the stack."""
    depth, op = len(position), step.rule.op.inverse
    stack = tuple(slice(p, p + 1) for p in position)

    def block(path: str, index: Index) -> np.ndarray:
        values = np.asarray(params[path][(*stack, *index)])
        return values.reshape(values.shape[depth:])

    def read(index: Selection) -> np.ndarray:
        wanted = _slices(index, step.needed[i])
        part = op.source_index(wanted) if len(step.targets) == 1 else None
        if part is not None:
            return op(block(step.targets[0], part))[0].astype(dtype, copy=False)
        whole = [
            block(path, tuple(slice(0, size) for size in shape[depth:]))
            for path, shape in zip(step.targets, step.shapes, strict=True)
        ]
        return op(*whole)[i][wanted].astype(dtype, copy=False)

    return read


def _slices(index: Selection, shape: Shape) -> Index:
    return tuple(slice(0, size) for size in shape) if index is ... else index
