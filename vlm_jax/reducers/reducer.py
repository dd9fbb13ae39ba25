"""The reducer protocol and the base classes of reducers."""

import dataclasses
from typing import ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.budget import refuse
from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.ranges import Natural, Size
from vlm_jax.types import Fields, Grid, Guidance, VisualFeatures

Rule = Literal["exact", "as_released"]
PositionRule = Literal["keep", "consecutive"]
Part = Literal["encoder", "decoder"]
GuidedBy = Literal["clip"]
WhichQuestion = Literal["first", "last"]


@runtime_checkable
class Reducer(Protocol):
    """The interface of every entry of `REDUCERS`; see the package's docstring.

    Attributes:
      kind: its key in `REDUCERS`, for errors.
      reduces_in: the part in whose blocks it reduces, or None.
      reduces_clips: whether it compares the frames of a video; it then has a field `frames`.
      guided_by: what it needs to know of the question: `clip` for `VisualFeatures.guidance`, the embeddings by both
        towers of a CLIP, and it is then a `GuidedReducer`; None where it needs nothing, or finds the text in the
        decoder's sequence.
      on_tokens: rules by which it acts on the connector's tokens even where it could act before the connector.
      rule: `exact` meets the budget exactly and leaves images within it unchanged; `as_released` has the counts,
        the order and the extra tokens of the released code.
      positions: whether kept tokens keep their positions (on all axes), or the row is renumbered.
    """

    kind: ClassVar[str]
    reduces_in: ClassVar[Part | None]
    reduces_clips: ClassVar[bool]
    guided_by: ClassVar[GuidedBy | None]
    on_tokens: ClassVar[tuple[Rule, ...]]

    @property
    def rule(self) -> Rule: ...

    @property
    def positions(self) -> PositionRule: ...

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> Fields:
        """The fields that leave `budget` of a full-size image's `grid`; raises `InfeasibleBudget`."""
        ...

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """(height, width) in pixels to which the processor resizes images."""
        ...

    def reduced_grid(self, grid: Grid) -> Grid:
        """The grid of the connector's input."""
        ...

    def connector_budget(self, grid: Grid) -> int:
        """The number of tokens that the connector must give."""
        ...

    def required_fields(self) -> dict[Part, Fields]:
        """{part: {field: value}} that the encoder and the decoder must have."""
        ...

    def num_left(self, count: int) -> int:
        """Tokens in the decoder's row of an image that has `count` before the reducer."""
        ...

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """The remaining features, with `kept`."""
        ...


@runtime_checkable
class GuidedReducer(Reducer, Protocol):
    """A reducer that is `guided_by` the question.

    Attributes:
      text_model: folder of the CLIP whose text tower and projections are read, or its name on the hub; the tower that
        the release's config names when None.
      question: which question chooses the tokens of an image: the `first` one from its own message on, or the `last`
        one of the conversation.
      segments: the most segments, each as long as the text tower, of a question in a row of a static shape, as in
        training; elsewhere questions have any number.
    """

    @property
    def text_model(self) -> str | None: ...

    @property
    def question(self) -> WhichQuestion: ...

    @property
    def segments(self) -> int: ...


class PassesFeatures(nn.Module, kw_only=True):
    """A reducer without requirements for other parts that returns features unchanged.

    Attributes:
      rule, positions: as in `Reducer`.
    """

    kind: ClassVar[str]
    reduces_in: ClassVar[Part | None] = None
    reduces_clips: ClassVar[bool] = False
    guided_by: ClassVar[GuidedBy | None] = None
    on_tokens: ClassVar[tuple[Rule, ...]] = ()

    rule: Rule = "exact"
    positions: PositionRule = "consecutive"

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """The image's own size."""
        del grid
        return height, width

    def reduced_grid(self, grid: Grid) -> Grid:
        """The grid of the connector's input."""
        return grid

    def connector_budget(self, grid: Grid) -> int:
        """One token per feature."""
        rows, cols = self.reduced_grid(grid)
        return rows * cols

    def required_fields(self) -> dict[Part, Fields]:
        """{part: {field: value}} that other parts must have: none."""
        return {}

    def num_left(self, count: int) -> int:
        """`count`."""
        return count

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """Returns the features unchanged."""
        del deterministic
        return features


class KeepsFeatures(PassesFeatures):
    """Keeps `num_kept` features of every image, which no longer form a rectangle.

    An image with no more features is unchanged.

    Attributes:
      num_kept: number of kept features, solved from the budget.
    """

    num_kept: Natural

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> Fields:
        """Any number of features up to all of them."""
        del num_layers
        total = grid[0] * grid[1]
        if not 1 <= budget <= total:
            raise refuse(cls.kind, budget, grid, [1, total], "it can only drop features")
        return {"num_kept": budget}

    def reduced_grid(self, grid: Grid) -> Grid:
        """(1, num_kept); the grid itself where nothing is dropped."""
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
        """Replaces the features at `kept` by `tokens`, with their mask unless one is given."""
        mask = pick(features.mask, kept) if mask is None else mask
        return features.reduced(tokens, mask, (1, tokens.shape[1]), kept)

    def passes(self, features: VisualFeatures) -> bool:
        """Whether no image can have more features than are kept."""
        return features.mask.shape[1] <= self.num_kept


class KeepsAttended(KeepsFeatures):
    """Keeps features by the attention that they get in the encoder's last block."""

    def required_fields(self) -> dict[Part, Fields]:
        """The attention of the last block, per head."""
        return {"encoder": {"saliency": "heads"}}

    def attended(self, features: VisualFeatures) -> tuple[Float[Array, "B N"], Float[Array, "B N K H"]]:
        """Saliency and keys of the features.

        Raises:
          ValueError: the encoder does not have the settings of `required_fields`.
        """
        if features.saliency is None or features.keys is None:
            raise ValueError(
                f"{self.kind} needs features with saliency and keys: set {self.required_fields()}, as build does"
            )
        return jax.lax.stop_gradient(features.saliency), jax.lax.stop_gradient(features.keys)


class GuidedByClip(KeepsFeatures):
    """Keeps features by the question, as the CLIP whose image tower the system has embeds both.

    Attributes:
      text_model: folder of that CLIP, whose text tower and projections are read, or its name on the hub; the tower
        that the release's config names when None.
      question: in a conversation of several questions, whether the `first` one from an image's own message on chooses
        its tokens, or the `last` one of all, so that each question, asked in turn, chooses anew.
      segments: in training, the most segments of a question, each as long as the text tower (77 tokens); every question
        takes as many to compute, and a longer one is refused.
    """

    guided_by: ClassVar[GuidedBy | None] = "clip"

    text_model: str | None = None
    question: WhichQuestion = "first"
    segments: Size = 1

    def guidance(self, features: VisualFeatures) -> Guidance:
        """The embeddings of the features and of the question.

        Raises:
          ValueError: there are none.
        """
        if features.guidance is None:
            raise ValueError(
                f"{self.kind} chooses by the question, but got features without guidance: expected a model with a "
                "guide and a batch with question, as with_budget makes them of a release"
            )
        return features.guidance


@row_by_row
def pick(x: jax.Array, index: Int[Array, "B K"]) -> jax.Array:
    """x[b, index[b, k]] for every image b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


@row_by_row
def best(scores: Float[Array, "B *rest N"], *, count: int) -> Int[Array, "B *rest K"]:
    """Indices of the `count` highest scores, the highest first."""
    return jax.lax.top_k(scores, count)[1]


def highest(scores: Float[Array, "B N"], mask: Bool[Array, "B N"], count: int) -> Int[Array, "B K"]:
    """Indices, ascending, of the `count` highest scores; masked features are chosen last."""
    scores = jnp.where(mask, jnp.nan_to_num(scores), -jnp.inf)
    return jnp.sort(best(scores, count=count), axis=-1)


def spread(wanted: Bool[Array, "B N"], count: int) -> Int[Array, "B K"]:
    """Indices, ascending, of `count` features spread evenly over those that are `wanted`.

    The i-th is wanted feature number i * num_wanted // count; where fewer are wanted, others follow them.
    """
    order = jnp.argsort(~wanted, axis=1)  # stable: wanted features in order, then the others
    total = wanted.sum(axis=1, keepdims=True)
    steps = jnp.arange(count)[None]
    return jnp.sort(pick(order, jnp.where(total >= count, steps * total // max(count, 1), steps)), axis=1)


@row_by_row
def marked(index: Int[Array, "B K"], *, size: int) -> Bool[Array, "B N"]:
    """True at the indices."""
    return jnp.zeros((index.shape[0], size), bool).at[jnp.arange(index.shape[0])[:, None], index].set(True)


def unit(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Vectors of length 1, float32; zero vectors stay zero."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def real(x: jax.Array, mask: Bool[Array, "B N"]) -> jax.Array:
    """x with zeros where it is masked."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def every(features: VisualFeatures) -> VisualFeatures:
    """All features, with `kept`."""
    kept = jnp.broadcast_to(jnp.arange(features.mask.shape[1])[None], features.mask.shape)
    return dataclasses.replace(features, kept=kept)
