"""The contract of decoders, which `decoders/__init__.py` registers."""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float, Int

from vlm_jax.decoders.cache import Cache
from vlm_jax.types import Drop, Dtype, Positions, VisualPlaces

Kind = TypeVar("Kind")  # the class of a module; beartype reads no `Self` here


class HeadKernel(NamedTuple):
    """A linear head without bias.

    Attributes:
      kernel: [V, D] of a table of embeddings, or [D, V].
      vocab_axis: axis of the vocabulary, 0 or 1.
      dtype: dtype of the product; hidden states and kernel are cast to it.
      softcap: bound of the logits, see `softcap.capped`; None for none.
    """

    kernel: Float[Array, "V D"] | Float[Array, "D V"]
    vocab_axis: int
    dtype: Dtype
    softcap: float | None = None


@runtime_checkable
class Decoder(Protocol):
    """A Linen module that is a causal language model over embeddings; a part of `models.vlm.VLM`.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      drops: where visual tokens are dropped between blocks, first to last.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def drops(self) -> tuple[Drop, ...]: ...

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks token ids up."""
        ...

    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype = None, places: VisualPlaces | None = None
    ) -> Cache:
        """An empty cache for `length` positions a row, in the decoder's `dtype` when None."""
        ...

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Positions,
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
        branch_ids: Int[Array, "B T"] | None = None,
        places: VisualPlaces | None = None,
        levels: Float[Array, "B T F"] | None = None,
        group_ids: Int[Array, "B T"] | None = None,
        token_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states of T positions after those in the cache, and the cache with them.

        `levels` are added to the outputs of the first blocks: D channels for each, concatenated. Positions of one group
        attend to each other in both directions; see `types.Batch`. `token_ids` are the ids of the text, and `NO_ID` at
        visual tokens, for decoders whose blocks read more of a token than its embedding.
        """
        ...

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Vocabulary logits in float32."""
        ...

    def head_kernel(self) -> HeadKernel:
        """The kernel of `logits`, for a loss that computes them by blocks of the vocabulary."""
        ...

    def clone(self: Kind, **fields: Any) -> Kind:
        """The decoder with other values of its fields."""
        ...
