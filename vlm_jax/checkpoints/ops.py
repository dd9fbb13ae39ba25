"""Invertible operations between arrays of a released checkpoint and our parameters.

An operation maps the tensors of a rule's source keys to the arrays of its targets. Each has an
exact inverse, so the table that imports a checkpoint also exports it. An operation of one array
(`Transpose`, `Reshape`, `Permute`) is applied to each of several.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.types import Config, Fields, Tree

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class Op(abc.ABC):
    """A bijection from n arrays to m arrays."""

    @abc.abstractmethod
    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The target arrays, views of the sources where possible."""

    @abc.abstractmethod
    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        """The target shapes for source arrays of `shapes`.

        Raises:
          ValueError: the operation cannot take these shapes; the message has the expected ones.
        """

    @property
    @abc.abstractmethod
    def inverse(self) -> "Op":
        """The inverse operation."""

    def source_index(self, index: Index) -> Index | None:
        """The index in the single source of the block `index` of the single target.

        None where the block cannot be read separately, so that the whole source is needed.
        """
        del index
        return None


class _OneArray(Op):
    """An operation of one array, applied to each of several."""

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(self._array(array) for array in arrays)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return tuple(self._shape(shape) for shape in shapes)

    @abc.abstractmethod
    def _array(self, array: np.ndarray) -> np.ndarray: ...

    @abc.abstractmethod
    def _shape(self, shape: Shape) -> Shape: ...


@dataclasses.dataclass(frozen=True)
class Identity(_OneArray):
    """Returns the array unchanged."""

    def _array(self, array: np.ndarray) -> np.ndarray:
        return array

    def _shape(self, shape: Shape) -> Shape:
        return shape

    @property
    def inverse(self) -> Op:
        return self

    def source_index(self, index: Index) -> Index | None:
        return index


@dataclasses.dataclass(frozen=True)
class Transpose(_OneArray):
    """Axis `axes[i]` of the source becomes axis i of the target."""

    axes: tuple[int, ...]

    def __post_init__(self):
        if sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"{self}: axes must be a permutation of 0 .. {len(self.axes) - 1}")

    def _array(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)

    def _shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.axes):
            raise ValueError(f"{self}: expected {len(self.axes)} axes, got the shape {shape}")
        return tuple(shape[axis] for axis in self.axes)

    @property
    def inverse(self) -> Op:
        return Transpose(tuple(self.axes.index(i) for i in range(len(self.axes))))

    def source_index(self, index: Index) -> Index | None:
        return tuple(index[self.axes.index(i)] for i in range(len(self.axes)))


@dataclasses.dataclass(frozen=True)
class Reshape(_OneArray):
    """An array of exactly the shape `source` becomes one of the shape `target`, in C order."""

    source: Shape
    target: Shape

    def __post_init__(self):
        if math.prod(self.source) != math.prod(self.target):
            raise ValueError(f"{self}: {math.prod(self.source)} elements cannot become {math.prod(self.target)}")

    def _array(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.target)

    def _shape(self, shape: Shape) -> Shape:
        if shape != self.source:
            raise ValueError(f"{self}: expected the shape {self.source}, got {shape}")
        return self.target

    @property
    def inverse(self) -> Op:
        return Reshape(self.target, self.source)


@dataclasses.dataclass(frozen=True, repr=False)
class Permute(_OneArray):
    """Row `order[i]` of the source along `axis` becomes row i of the target."""

    axis: int
    order: tuple[int, ...]

    def __post_init__(self):
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"Permute: order must be a permutation of 0 .. {len(self.order) - 1}")

    def __repr__(self) -> str:
        return f"Permute(axis={self.axis}, {len(self.order)} rows)"

    def _array(self, array: np.ndarray) -> np.ndarray:
        return np.take(array, self.order, axis=self.axis)

    def _shape(self, shape: Shape) -> Shape:
        if len(shape) <= self.axis or shape[self.axis] != len(self.order):
            raise ValueError(f"Permute: expected {len(self.order)} rows along axis {self.axis}, got the shape {shape}")
        return shape

    @property
    def inverse(self) -> Op:
        return Permute(self.axis, tuple(int(i) for i in np.argsort(self.order)))


@dataclasses.dataclass(frozen=True)
class Split(Op):
    """Splits one array along `axis` into parts of `sizes`."""

    axis: int
    sizes: tuple[int, ...]

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        (array,) = arrays
        return tuple(np.split(array, np.cumsum(self.sizes)[:-1], axis=self.axis))

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        fits = len(shapes) == 1 and len(shapes[0]) > self.axis and shapes[0][self.axis] == sum(self.sizes)
        if not fits:
            raise ValueError(
                f"{self}: expected one array with {sum(self.sizes)} rows on axis {self.axis}, got {shapes}"
            )
        (shape,) = shapes
        return tuple((*shape[: self.axis], size, *shape[self.axis + 1 :]) for size in self.sizes)

    @property
    def inverse(self) -> Op:
        return Concatenate(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Concatenate(Op):
    """Concatenates arrays with `sizes` rows along `axis`."""

    axis: int
    sizes: tuple[int, ...]

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.concatenate(arrays, axis=self.axis),)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        long_enough = all(len(shape) > self.axis for shape in shapes)
        found = tuple(shape[self.axis] for shape in shapes) if long_enough else None
        others = {(*shape[: self.axis], *shape[self.axis + 1 :]) for shape in shapes}
        if found != self.sizes or len(others) != 1:
            raise ValueError(f"{self}: expected arrays that differ only on axis {self.axis}, got the shapes {shapes}")
        return ((*shapes[0][: self.axis], sum(self.sizes), *shapes[0][self.axis + 1 :]),)

    @property
    def inverse(self) -> Op:
        return Split(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Parallel(Op):
    """Applies operation i to array i; every operation takes a single array."""

    ops: tuple[Op, ...]

    def __init__(self, *ops: Op):
        object.__setattr__(self, "ops", ops)

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(op(array)[0] for op, array in zip(self.ops, arrays, strict=True))

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        if len(shapes) != len(self.ops):
            raise ValueError(f"{self}: expected {len(self.ops)} arrays, got {len(shapes)}")
        return tuple(op.shapes(shape)[0] for op, shape in zip(self.ops, shapes, strict=True))

    @property
    def inverse(self) -> Op:
        return Parallel(*(op.inverse for op in self.ops))


@dataclasses.dataclass(frozen=True)
class Shared(Op):
    """Merges `count` equal arrays into one: a tensor that a release stores under several names."""

    count: int

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return (arrays[0],)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        if len(shapes) != self.count or len(set(shapes)) != 1:
            raise ValueError(f"{self}: expected {self.count} arrays of one shape, got the shapes {shapes}")
        return (shapes[0],)

    @property
    def inverse(self) -> Op:
        return Copied(self.count)

    def source_index(self, index: Index) -> Index | None:
        return index


@dataclasses.dataclass(frozen=True)
class Copied(Op):
    """Copies one array `count` times."""

    count: int

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        (array,) = arrays
        return (array,) * self.count

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        if len(shapes) != 1:
            raise ValueError(f"{self}: expected one array, got the shapes {shapes}")
        return shapes * self.count

    @property
    def inverse(self) -> Op:
        return Shared(self.count)

    def source_index(self, index: Index) -> Index | None:
        return index


@dataclasses.dataclass(frozen=True)
class Each(Op):
    """Applies `op` to every slice of the leading axis: for a release with stacked layers."""

    op: Op

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        slices = [self.op(*parts) for parts in zip(*arrays, strict=True)]
        return tuple(np.stack(parts) for parts in zip(*slices, strict=True))

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        counts = {shape[:1] for shape in shapes}
        if len(counts) != 1 or counts == {()}:
            raise ValueError(f"{self}: expected arrays with equal leading axes, got the shapes {shapes}")
        (count,) = counts
        return tuple((*count, *shape) for shape in self.op.shapes(*(shape[1:] for shape in shapes)))

    @property
    def inverse(self) -> Op:
        return Each(self.op.inverse)


@dataclasses.dataclass(frozen=True)
class Chain(Op):
    """Applies operations in order."""

    ops: tuple[Op, ...]

    def __init__(self, *ops: Op):
        object.__setattr__(self, "ops", ops)

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        for op in self.ops:
            arrays = op(*arrays)
        return arrays

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        for op in self.ops:
            shapes = op.shapes(*shapes)
        return shapes

    @property
    def inverse(self) -> Op:
        return Chain(*(op.inverse for op in reversed(self.ops)))

    def source_index(self, index: Index) -> Index | None:
        found: Index | None = index
        for op in reversed(self.ops):
            if found is None:
                return None
            found = op.source_index(found)
        return found


OPS: dict[str, type[Op]] = {
    "identity": Identity,
    "transpose": Transpose,
    "reshape": Reshape,
    "permute": Permute,
    "split": Split,
    "concatenate": Concatenate,
    "parallel": Parallel,
    "shared": Shared,
    "copied": Copied,
    "each": Each,
    "chain": Chain,
}


def to_data(op: Op) -> Fields:
    """The operation as JSON types: its name in `OPS`, and its fields."""
    (kind,) = (kind for kind, cls in OPS.items() if type(op) is cls)
    return {"kind": kind, **{field.name: _plain(getattr(op, field.name)) for field in dataclasses.fields(op)}}  # type: ignore[arg-type]


def from_data(data: Config) -> Op:
    """The inverse of `to_data`.

    Raises:
      KeyError, TypeError, ValueError: `data` is not a result of `to_data`.
    """
    fields = {name: _value(value) for name, value in data.items() if name != "kind"}
    cls = OPS[data["kind"]]
    return cls(*fields.pop("ops"), **fields) if "ops" in fields else cls(**fields)


def _plain(value: Tree) -> Tree:
    if isinstance(value, Op):
        return to_data(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else int(value)


def _value(value: Tree) -> Tree:
    if isinstance(value, Mapping):
        return from_data(value)
    return tuple(map(_value, value)) if isinstance(value, list) else int(value)


IDENTITY = Identity()
LINEAR = Transpose((1, 0))  # torch [out, in] -> kernel [in, out]
CONV2D = Transpose((2, 3, 1, 0))  # torch [out, in, height, width] -> kernel [height, width, in, out]


def patch_linear(patch_size: int, channels: int, features: int) -> Op:
    """A torch patch convolution -> the linear kernel [patch * patch * channels, features]."""
    window = (patch_size, patch_size, channels)
    return Chain(CONV2D, Reshape((*window, features), (math.prod(window), features)))


def fused_linear(*sizes: int) -> Op:
    """One torch weight [sum(sizes), in] -> kernels [in, size]: concatenated query, key and value."""
    return Chain(Split(0, sizes), LINEAR)


def fused_bias(*sizes: int) -> Op:
    """One bias [sum(sizes)] -> biases [size]."""
    return Split(0, sizes)


def grouped_linear(num_groups: int, sizes: Sequence[int], in_dim: int) -> Op:
    """A torch weight whose rows are ordered by group -> one kernel [in, num_groups * size] per part.

    Per-head [query, key, value] is `grouped_linear(num_heads, (head_dim,) * 3, in_dim)`; InternLM2's
    wqkv, where each key-value head follows its query heads, is
    `grouped_linear(num_kv_heads, (queries_per_kv * head_dim, head_dim, head_dim), in_dim)`.

    Args:
      num_groups: groups in the weight's rows.
      sizes: rows of each part inside a group.
      in_dim: columns of the weight.
    """
    return Chain(_grouped(num_groups, tuple(sizes), (in_dim,)), LINEAR)


def grouped_bias(num_groups: int, sizes: Sequence[int]) -> Op:
    """The bias of a `grouped_linear`."""
    return _grouped(num_groups, tuple(sizes), ())


def _grouped(num_groups: int, sizes: tuple[int, ...], rest: Shape) -> Op:
    return Chain(
        Reshape((num_groups * sum(sizes), *rest), (num_groups, sum(sizes), *rest)),
        Split(1, sizes),
        Parallel(*(Reshape((num_groups, size, *rest), (num_groups * size, *rest)) for size in sizes)),
    )
