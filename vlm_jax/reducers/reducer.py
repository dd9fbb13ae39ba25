"""The contract of reducers, what they share, and what those share that keep some of an encoder's features."""

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.budget import refuse
from vlm_jax.types import Grid, VisualFeatures

Rule = Literal["exact", "as_released"]
PositionRule = Literal["keep", "consecutive"]
Part = Literal["encoder", "decoder"]


@runtime_checkable
class Reducer(Protocol):
    """The contract of every entry of `REDUCERS`; see the package's docstring.

    Attributes:
      kind: its name in the table, for messages.
      reduces_in: the part whose blocks it works in, or None.
      rule: `exact` leaves precisely the budget, and an image that has no more as it is; `as_released` has the counts,
        the order and the extra tokens of the released code.
      positions: whether a token that is left keeps its position (on all axes), or the row is numbered anew.
    """

    kind: ClassVar[str]
    reduces_in: ClassVar[Part | None]

    @property
    def rule(self) -> Rule: ...

    @property
    def positions(self) -> PositionRule: ...

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> dict[str, Any]:
        """The fields that leave `budget` of a full-size image's `grid`, or `InfeasibleBudget`."""
        ...

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """What the processor resizes images to, in pixels."""
        ...

    def reduced_grid(self, grid: Grid) -> Grid:
        """The grid that the connector meets."""
        ...

    def connector_budget(self, grid: Grid) -> int:
        """Tokens that the connector is to give."""
        ...

    def required_fields(self) -> dict[Part, dict[str, Any]]:
        """What the encoder and the decoder must be set to."""
        ...

    def num_left(self, count: int) -> int:
        """Tokens that an image takes in the decoder's row if it has `count` before the reducer."""
        ...

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """What is left, with `kept`."""
        ...


class PassesFeatures(nn.Module, kw_only=True):
    """A reducer that asks nothing of the other parts, and passes features on as they are.

    Attributes:
      rule, positions: as in `Reducer`.
    """

    kind: ClassVar[str]
    reduces_in: ClassVar[Part | None] = None

    rule: Rule = "exact"
    positions: PositionRule = "consecutive"

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """The image's own."""
        del grid
        return height, width

    def reduced_grid(self, grid: Grid) -> Grid:
        """The grid that the connector meets."""
        return grid

    def connector_budget(self, grid: Grid) -> int:
        """Tokens that the connector is to give: as many as there are features."""
        rows, cols = self.reduced_grid(grid)
        return rows * cols

    def required_fields(self) -> dict[Part, dict[str, Any]]:
        """{part: {field: value}} of what other parts must be set to."""
        return {}

    def num_left(self, count: int) -> int:
        """All."""
        return count

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """Features pass."""
        del deterministic
        return features


class KeepsFeatures(PassesFeatures):
    """Leaves `num_kept` features of every image; what is kept forms no rectangle any more.

    An image with no more features than that passes as it is.

    Attributes:
      num_kept: features left, solved from the budget.
    """

    num_kept: int

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> dict[str, Any]:
        """Any number of features up to all of them."""
        del num_layers
        total = grid[0] * grid[1]
        if not 1 <= budget <= total:
            raise refuse(cls.kind, budget, grid, [1, total], "it can only leave features out")
        return {"num_kept": budget}

    def reduced_grid(self, grid: Grid) -> Grid:
        """One row; the grid itself where nothing is left out."""
        count = grid[0] * grid[1]
        left = self.num_left(count)
        return grid if self.rule == "exact" and left == count else (1, left)

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer."""
        return min(self.num_kept, count)

    def take(self, features: VisualFeatures, kept: Int[Array, "B K"]) -> VisualFeatures:
        """The features at `kept`."""
        return self.left(features, pick(features.tokens, kept), kept)

    def left(
        self,
        features: VisualFeatures,
        tokens: Float[Array, "B K D"],
        kept: Int[Array, "B K"],
        mask: Bool[Array, "B K"] | None = None,
    ) -> VisualFeatures:
        """`tokens` in place of the features at `kept`, whose mask they have unless one is given."""
        mask = pick(features.mask, kept) if mask is None else mask
        return features.reduced(tokens, mask, (1, tokens.shape[1]), kept)

    def passes(self, features: VisualFeatures) -> bool:
        """Whether no image can have more than may be left."""
        return features.mask.shape[1] <= self.num_kept

    def attended(self, features: VisualFeatures) -> tuple[Float[Array, "B N"], Float[Array, "B N K H"]]:
        """Saliency and keys of the features.

        Raises:
          ValueError: the encoder was not set to what `required_fields` says.
        """
        if features.saliency is None or features.keys is None:
            raise ValueError(
                f"{self.kind} wants features with saliency and keys: set {self.required_fields()}, as build does"
            )
        return jax.lax.stop_gradient(features.saliency), jax.lax.stop_gradient(features.keys)


def pick(x: Any, index: Int[Array, "B K"]) -> Any:
    """x[b, index[b, k]] of every image b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def highest(scores: Float[Array, "B N"], mask: Bool[Array, "B N"], count: int) -> Int[Array, "B K"]:
    """Indices, ascending, of the `count` highest scores; what is masked comes after all that is real."""
    scores = jnp.where(mask, jnp.nan_to_num(scores), -jnp.inf)
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


def spread(wanted: Bool[Array, "B N"], count: int) -> Int[Array, "B K"]:
    """Indices, ascending, of `count` features spread evenly over those that are wanted.

    The i-th is wanted feature number i * (wanted in all) // count; where fewer are wanted, others follow them.
    """
    order = jnp.argsort(~wanted, axis=1)  # stable: wanted ones in their order, then the others
    total = wanted.sum(axis=1, keepdims=True)
    steps = jnp.arange(count)[None]
    return jnp.sort(pick(order, jnp.where(total >= count, steps * total // max(count, 1), steps)), axis=1)


def marked(index: Int[Array, "B K"], size: int) -> Bool[Array, "B N"]:
    """True at the indices."""
    return jnp.zeros((index.shape[0], size), bool).at[jnp.arange(index.shape[0])[:, None], index].set(True)


def unit(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Vectors of length 1, float32; zeros stay."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def real(x: Any, mask: Bool[Array, "B N"]) -> Any:
    """x with zeros where it is masked, whatever it holds there."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def every(features: VisualFeatures) -> VisualFeatures:
    """The features as they are, with `kept`."""
    kept = jnp.broadcast_to(jnp.arange(features.mask.shape[1])[None], features.mask.shape)
    return dataclasses.replace(features, kept=kept)
