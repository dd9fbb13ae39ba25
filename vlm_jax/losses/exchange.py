"""Two-tower losses over a batch that is split over devices; no device holds all the logits.

Every device keeps its images. The exchange sends the texts between devices:

| exchange | what a device holds at a time | messages |
|---|---|---|
| gather | all features, and its rows (for softmax: its columns too) of the logits | one all-gather |
| reduce | one device's texts, broadcast by a sum with zeros of the others | one sum per device |
| shift | one device's texts, sent to the next neighbour after use | one neighbour, one direction |
| ring | the same, one half of the texts in each direction | both neighbours, half as large |

In the last three the gradients of the texts (and the softmax sums of their columns) travel with
the texts, and the logits exist in tiles. `gather` is the definition, differentiated by JAX.
Source: open_clip's `SigLipLoss(dist_impl=gather | reduce | shift | bidir)`; Zhai et al. 2023,
section 3.3. Deviation: `bidir` sends whole blocks both ways for half as many steps; halves sent
around the full ring use the links equally, need half the memory, and return to their owner.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from vlm_jax.losses.pairwise import DEFAULT_BLOCK_SIZE, Axis, Combine, Offset, Towers, Visit, axis_names, stream, vary
from vlm_jax.losses.two_tower import LOSSES, check_block_size, pack
from vlm_jax.types import Array, Tree


def _count(tree: Tree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _rotate(
    axis: Axis, visit: Visit, home: Tree, streams: list[tuple[Tree, Tree, int, int]]
) -> tuple[Tree, list[Tree]]:
    """Passes streams of (fixed, travelling, direction, first row in the owner's block) around the ring."""
    size, me = lax.axis_size(axis), lax.axis_index(axis)
    local = _count(home)

    def send(tree: Tree, direction: int) -> Tree:
        neighbours = [(i, (i + direction) % size) for i in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, axis, neighbours), tree)

    def meet(step: Offset, home: Tree, blocks: list[tuple[Tree, Tree]]) -> tuple[Tree, list[Tree]]:
        travelled = []
        for (fixed, travelling), (_, _, direction, first) in zip(blocks, streams, strict=True):
            owner = (me - direction * step) % size
            home, travelling = visit(home, fixed, travelling, (me - owner) * local - first)
            travelled.append(travelling)
        return home, travelled

    def turn(step: Offset, carry: Tree) -> Tree:
        home, blocks = carry
        # The next texts do not depend on this visit: they can be sent while it computes.
        onward = [send(fixed, s[2]) for (fixed, _), s in zip(blocks, streams, strict=True)]
        home, travelled = meet(step, home, blocks)
        travelled = [send(x, s[2]) for x, s in zip(travelled, streams, strict=True)]
        return home, list(zip(onward, travelled, strict=True))

    carry = (home, [(fixed, travelling) for fixed, travelling, _, _ in streams])
    home, blocks = lax.fori_loop(0, size - 1, turn, carry)
    home, travelled = meet(size - 1, home, blocks)
    return home, [send(x, s[2]) for x, s in zip(travelled, streams, strict=True)]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Sends blocks of texts around the ring in one direction."""

    axis: Axis

    def __call__(self, visit: Visit, home: Tree, fixed: Tree, travelling: Tree, combine: Combine) -> tuple[Tree, Tree]:
        home, (travelling,) = _rotate(self.axis, visit, home, [(fixed, travelling, 1, 0)])
        return home, travelling


@dataclasses.dataclass(frozen=True)
class Ring:
    """Sends the first half of every block around the ring in one direction, the second half in the other."""

    axis: Axis

    def __call__(self, visit: Visit, home: Tree, fixed: Tree, travelling: Tree, combine: Combine) -> tuple[Tree, Tree]:
        half = _count(home) // 2
        if half == 0:  # one example per device
            return Shift(self.axis)(visit, home, fixed, travelling, combine)
        low, high = (
            jax.tree.map(lambda x, part=part: x[part], (fixed, travelling)) for part in (slice(half), slice(half, None))
        )
        home, travelled = _rotate(self.axis, visit, home, [(*low, 1, 0), (*high, -1, half)])
        return home, jax.tree.map(lambda *parts: jnp.concatenate(parts), *travelled)


@dataclasses.dataclass(frozen=True)
class Reduce:
    """Each device in turn broadcasts its texts."""

    axis: Axis

    def __call__(self, visit: Visit, home: Tree, fixed: Tree, travelling: Tree, combine: Combine) -> tuple[Tree, Tree]:
        me = lax.axis_index(self.axis)
        local = _count(home)
        nothing = travelling

        def turn(owner: Offset, carry: Tree) -> Tree:
            home, travelling = carry
            shown = jax.tree.map(lambda x: lax.psum(jnp.where(me == owner, x, 0), self.axis), fixed)
            home, partial = visit(home, vary(shown, self.axis), nothing, (me - owner) * local)
            total = vary(combine(partial), self.axis)
            mine = jax.tree.map(lambda x, y: jnp.where(me == owner, x, y), total, travelling)
            return home, mine

        return lax.fori_loop(0, lax.axis_size(self.axis), turn, (home, travelling))


STREAMED = {"reduce": Reduce, "shift": Shift, "ring": Ring}
EXCHANGES = ("gather", *STREAMED)


def _choose(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")


def device_loss(
    loss: str, axis: Axis, *, exchange: str = "ring", block_size: int = DEFAULT_BLOCK_SIZE
) -> Callable[..., Tree]:
    """A loss for use inside a `jax.shard_map` over `axis`, as a function of one device's features.

    Arguments and errors are those of `distributed`. The returned function takes the keyword arguments of
    the single-device loss, with features [B / devices, D], and returns the loss of the whole batch,
    the same on every device. Call it under `check_vma=True` (the default): gradients rely on it.
    """
    _choose("loss", loss, LOSSES)
    _choose("exchange", exchange, EXCHANGES)
    check_block_size(block_size)
    objective = LOSSES[loss]

    def gathered(towers: Towers, scalars: Tree) -> tuple[jax.Array, ...]:
        every = jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), towers)
        first = lax.axis_index(axis) * towers.image.shape[0]
        return tuple(lax.pmean(part, axis) for part in objective.full(towers, every, scalars, first))

    def on_device(
        image_features: Array,
        text_features: Array,
        *,
        scale: ArrayLike,
        bias: ArrayLike = 0.0,
        **teacher: Any,
    ) -> Tree:
        towers, scalars = pack(objective, image_features, text_features, scale=scale, bias=bias, **teacher)
        scalars = vary(scalars, axis)
        if exchange == "gather":
            parts = gathered(towers, scalars)
        else:
            rows = min(block_size, towers.image.shape[0])
            parts = stream(objective, STREAMED[exchange](axis), rows)(towers, scalars)
        return parts if objective.has_teacher else parts[0]

    return on_device


def distributed(
    loss: str,
    mesh: Mesh | AbstractMesh,
    axis: Axis = "data",
    *,
    exchange: str = "ring",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Callable[..., Tree]:
    """A two-tower loss of global arrays whose examples are split over `axis` of `mesh`.

    Args:
      loss: a key of `LOSSES`.
      mesh: devices; along axes not in `axis` all compute the same.
      axis: mesh axis, or axes, over which the examples are split.
      exchange: one of `EXCHANGES`; values and gradients are those of the single-device loss.
      block_size: images in a tile of logits on each device; `gather` has no tiles.

    Returns:
      A function of the arguments of the single-device loss (`block_size` aside), for use under
      `jax.jit`: features [B, D], scale, bias, and the teacher's. It returns what that loss returns.

    Raises:
      ValueError: an unknown loss, exchange or mesh axis, a block size below 1; when called, a batch
        that is not divisible by the devices along `axis`, and the errors of the single-device loss.
    """
    inner = device_loss(loss, axis, exchange=exchange, block_size=block_size)
    for name in axis_names(axis):
        _choose("mesh axis", name, mesh.axis_names)
    devices = functools.reduce(lambda count, name: count * mesh.shape[name], axis_names(axis), 1)

    def call(image_features: Array, text_features: Array, **arguments: Any) -> Any:
        arguments.setdefault("bias", 0.0)
        towers, scalars = pack(LOSSES[loss], image_features, text_features, **arguments)
        batch = towers.image.shape[0]
        if batch % devices:
            raise ValueError(
                f"expected a batch divisible by the {devices} devices along mesh axis {axis!r}, got "
                f"{batch} examples; use {batch - batch % devices} or {batch + devices - batch % devices}"
            )

        def shard(towers, scalars):
            teacher = {}
            if LOSSES[loss].has_teacher:
                teacher = {
                    "teacher_image_features": towers.teacher_image,
                    "teacher_text_features": towers.teacher_text,
                    "teacher_scale": scalars.teacher_scale,
                }
            return inner(towers.image, towers.text, scale=scalars.scale, bias=scalars.bias, **teacher)

        return jax.shard_map(shard, mesh=mesh, in_specs=(P(axis), P()), out_specs=P())(towers, scalars)

    return call
