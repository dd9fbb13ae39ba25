"""Losses over all pairs of two batches, computed without the matrix of all pairs.

The logit of image i and text j of a batch is `scale * <image_i, text_j> + bias`. A loss of this
package is an `Objective`: `statistics` of every row and every column of the logits, which are
computed tile by tile and merged, and the gradient of a tile, which may depend on the complete
statistics. `stream` iterates over the tiles: `block_size` images and one block of texts at a
time. A `Traverse` (`exchange.py`) brings the blocks of texts to each device;
on a single device there is one block, all texts.

For an objective whose gradient needs no statistics (`one_pass`), value and gradients are computed in
one pass with three matrix products, as many as automatic differentiation of the full matrix
needs. The others need two passes, forward and backward, with four products.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from vlm_jax.types import Array, Tree

DEFAULT_BLOCK_SIZE = 512  # images in a tile; 512 x 4,096 float32 logits are 8 MiB

Axis = str | tuple[str, ...]
Offset = int | Array  # an index, on the host or computed on the device


class Towers(NamedTuple):
    """Features of both towers, and of an optional teacher's; row i of each is a pair."""

    image: Float[Array, "R D"]
    text: Float[Array, "C D"]
    teacher_image: Float[Array, "R E"] | None = None
    teacher_text: Float[Array, "C E"] | None = None


class Scalars(NamedTuple):
    """Scales and bias of the logits; each a float32 scalar."""

    scale: Float[Array, ""]
    bias: Float[Array, ""]
    teacher_scale: Float[Array, ""] | None = None


class Tile(NamedTuple):
    """A tile of the logits; `positive` marks the matching pairs.

    `scaled` are the student's logits before the bias.
    """

    scaled: Float[Array, "r c"]
    student: Float[Array, "r c"]
    teacher: Float[Array, "r c"] | None
    positive: Bool[Array, "r c"]


@runtime_checkable
class Objective(Protocol):
    """A loss over all pairs; statistics are pytrees whose leaves have one entry per row (or column)."""

    @property
    def one_pass(self) -> bool:
        """Whether the gradient of a tile needs no statistics."""
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether the loss needs a teacher's features."""
        ...

    def full(self, own: Towers, every: Towers, scalars: Scalars, first: Offset) -> tuple[jax.Array, ...]:
        """The definition: the mean loss of `own`, rows `first`, `first + 1` … of `every`."""
        ...

    def empty(self, rows: int, columns: int) -> tuple[Tree, Tree]:
        """Row and column statistics before the first tile."""
        ...

    def statistics(self, tile: Tile) -> tuple[Tree, Tree]:
        """Row and column statistics of one tile."""
        ...

    def merge(self, left: Tree, right: Tree) -> Tree:
        """Merges the statistics of two tiles."""
        ...

    def combine(self, statistics: Tree, axis: Axis | None) -> Tree:
        """Merges the statistics of all devices along `axis`."""
        ...

    def totals(self, rows: Tree, columns: Tree) -> tuple[jax.Array, ...]:
        """Every part of the loss, summed over examples, from complete statistics."""
        ...

    def gradient(self, tile: Tile, rows: Tree, columns: Tree, weights: tuple[Array | float, ...]) -> jax.Array:
        """Gradient of `sum(weights * totals)` for the student logits of one tile."""
        ...


class Home(NamedTuple):
    """Accumulators for a device's images: statistics and optional gradients."""

    rows: Tree
    image: Float[Array, "R D"] | None = None
    scale: Float[Array, " R"] | None = None
    bias: Float[Array, " R"] | None = None


class Travelling(NamedTuple):
    """Accumulators for a block of texts: statistics and optional gradients."""

    columns: Tree
    text: Float[Array, "C D"] | None = None


def make_tile(towers: Towers, scalars: Scalars, offset: Offset) -> Tile:
    """The float32 logits of `towers.image` and `towers.text`; row i matches column i + offset."""

    def multiply(image, text, scale):
        return jnp.einsum("rd,cd->rc", scale * image.astype(jnp.float32), text.astype(jnp.float32))

    scaled = multiply(towers.image, towers.text, scalars.scale)
    teacher = None
    if towers.teacher_image is not None:
        teacher = multiply(towers.teacher_image, towers.teacher_text, scalars.teacher_scale)
    row, column = (lax.broadcasted_iota(jnp.int32, scaled.shape, axis) for axis in (0, 1))
    return Tile(scaled, scaled + scalars.bias, teacher, row + offset == column)


def _take(tree: Tree, start: Offset, size: int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree: Tree, part: Tree, start: Offset) -> Tree:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


def sweep(
    objective: Objective,
    towers: Towers,
    scalars: Scalars,
    home: Home,
    travelling: Travelling,
    offset: Offset,
    *,
    statistics: bool,
    weights: tuple[Array | float, ...] | None,
    block_size: int,
) -> tuple[Home, Travelling]:
    """Adds one block of texts to the accumulators, `block_size` images at a time.

    Args:
      offset: image i matches text i + offset, which may be outside the block.
      statistics: whether to accumulate them; otherwise they are complete and only read.
      weights: of the loss's parts, to accumulate gradients as well; None for no gradients.
      block_size: images in a tile; the last tile may be smaller.
    """

    def step(start: Offset, size: int, home: Home, travelling: Travelling) -> tuple[Home, Travelling]:
        image, teacher_image, own = _take((towers.image, towers.teacher_image, home), start, size)
        tile = make_tile(towers._replace(image=image, teacher_image=teacher_image), scalars, offset + start)
        if statistics:
            rows, columns = objective.statistics(tile)
            own = own._replace(rows=objective.merge(own.rows, rows))
            travelling = travelling._replace(columns=objective.merge(travelling.columns, columns))
        if weights is not None:
            gradient = objective.gradient(tile, own.rows, travelling.columns, weights)
            own = own._replace(
                image=own.image + gradient @ towers.text.astype(jnp.float32),
                scale=own.scale + jnp.sum(gradient * tile.scaled, axis=1),
                bias=own.bias + jnp.sum(gradient, axis=1),
            )
            travelling = travelling._replace(text=travelling.text + gradient.T @ image.astype(jnp.float32))
        return _put(home, own, start), travelling

    whole, rest = divmod(towers.image.shape[0], block_size)
    state = (home, travelling)
    state = lax.fori_loop(0, whole, lambda i, state: step(i * block_size, block_size, *state), state)
    return step(whole * block_size, rest, *state) if rest else state


# (home, fixed, travelling, offset) -> (home, travelling): the computation for one block of texts.
Visit = Callable[[Tree, Tree, Tree, Offset], tuple[Tree, Tree]]
Combine = Callable[[Tree], Tree]  # of partial statistics of several devices


@runtime_checkable
class Traverse(Protocol):
    """Brings every block of texts to every device; see `exchange.py`."""

    @property
    def axis(self) -> Axis | None:
        """Mesh axes over which the batch is split; None for a single device."""
        ...

    def __call__(self, visit: Visit, home: Tree, fixed: Tree, travelling: Tree, combine: Combine) -> tuple[Tree, Tree]:
        """Returns (home, travelling) after visiting every block; `travelling` is returned to its owner."""
        ...


# Not a NamedTuple: `stream` is cached, and empty NamedTuples of different classes are equal.
@dataclasses.dataclass(frozen=True)
class Alone:
    """The traverse of a single device: one block of all texts."""

    axis: None = None

    def __call__(self, visit: Visit, home: Tree, fixed: Tree, travelling: Tree, combine: Combine) -> tuple[Tree, Tree]:
        return visit(home, fixed, travelling, 0)


def axis_names(axis: Axis | None) -> tuple[str, ...]:
    """The names in `axis`: none, one or several."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)


def vary(tree: Tree, axis: Axis | None) -> Tree:
    """Marks every leaf as varying over the devices along `axis`, if it is not marked yet."""
    if axis is None:
        return tree
    # Both branches are x, so the compiler removes the select; its type varies over devices.
    anywhere = lax.axis_index(axis) >= 0
    return jax.tree.map(lambda x: jnp.where(anywhere, x, x), tree)


@functools.cache
def stream(objective: Objective, traverse: Traverse, block_size: int) -> Callable[..., tuple[jax.Array, ...]]:
    """The loss's parts as a function of (towers, scalars), averaged over the whole batch.

    Differentiable once, for the features, the scale and the bias; not for the teacher.
    """

    def walk(towers, scalars, rows, columns, statistics, weights):
        home, travelling = Home(rows), Travelling(columns if statistics else None)
        if weights is not None:
            zeros = [jnp.zeros(x.shape, jnp.float32) for x in towers[:2]]
            home = Home(rows, zeros[0], zeros[0][:, 0], zeros[0][:, 0])
            travelling = travelling._replace(text=zeros[1])
        fixed = (towers.text, towers.teacher_text, None if statistics else columns)

        def visit(home, fixed, travelling, offset):
            text, teacher_text, complete = fixed
            if not statistics:
                travelling = travelling._replace(columns=complete)
            home, travelling = sweep(
                objective,
                towers._replace(text=text, teacher_text=teacher_text),
                scalars,
                home,
                travelling,
                offset,
                statistics=statistics,
                weights=weights,
                block_size=block_size,
            )
            return home, travelling if statistics else travelling._replace(columns=None)

        def combine(travelling):
            columns = objective.combine(travelling.columns, traverse.axis) if statistics else None
            return Travelling(columns, jax.tree.map(lambda x: lax.psum(x, traverse.axis), travelling.text))

        home, travelling = vary((home, travelling), traverse.axis)
        return traverse(visit, home, fixed, travelling, combine)

    def all_devices(x):
        return lax.psum(x, traverse.axis) if traverse.axis is not None else x

    def batch(towers):
        return all_devices(towers.image.shape[0])

    def value(towers, scalars, weights=None):
        empty = objective.empty(towers.image.shape[0], towers.text.shape[0])
        home, travelling = walk(towers, scalars, *empty, True, weights)
        totals = objective.totals(home.rows, travelling.columns)
        return tuple(all_devices(part) / batch(towers) for part in totals), home, travelling

    def cotangents(towers, scalars, home, travelling, factor):
        gradients = (home.image * (scalars.scale * factor), travelling.text * (scalars.scale * factor))
        features = [x.astype(like.dtype) for x, like in zip(gradients, towers[:2], strict=True)]
        scale = jnp.sum(home.scale) / scalars.scale
        return Towers(*features), Scalars(scale * factor, jnp.sum(home.bias) * factor)

    @jax.custom_vjp
    def loss(towers: Towers, scalars: Scalars):
        return value(towers, scalars)[0]

    def forward(towers, scalars):
        weights = (1.0 / batch(towers),) if objective.one_pass else None
        parts, home, travelling = value(towers, scalars, weights)
        return parts, (towers, scalars, home, travelling)

    def backward(residuals, parts):
        towers, scalars, home, travelling = residuals
        if objective.one_pass:
            return cotangents(towers, scalars, home, travelling, parts[0])
        weights = tuple(part / batch(towers) for part in parts)
        home, travelling = walk(towers, scalars, home.rows, travelling.columns, False, weights)
        return cotangents(towers, scalars, home, travelling, 1.0)

    loss.defvjp(forward, backward)
    return loss
