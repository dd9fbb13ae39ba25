"""The contract of connectors, which `connectors/__init__.py` registers."""

from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float

from vlm_jax.types import Dtype, Fields, Grid, VisualFeatures, VisualTokens

Kind = TypeVar("Kind")  # the class of a module; beartype reads no `Self` here


@runtime_checkable
class Connector(Protocol):
    """A Linen module that turns visual features into tokens of the decoder's width; see the package's docstring.

    Attributes:
      features: the decoder's width D.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    @property
    def features(self) -> int: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def param_dtype(self) -> Dtype: ...

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The fields that give `budget` tokens of a `grid`, or `InfeasibleBudget`."""
        ...

    def num_tokens(self, grid: Grid) -> int:
        """Tokens of a grid of features; raises `InfeasibleGrid`."""
        ...

    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of the tokens; None where a token has no place."""
        ...

    def clone(self: Kind, **fields: Any) -> Kind:
        """The connector with other values of its fields."""
        ...

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        """`num_tokens` tokens of every image."""
        ...


@runtime_checkable
class IndicatorConnector(Connector, Protocol):
    """A connector that also holds rows which stand first in the visual table (`VLM.learned_rows`).

    Attributes:
      num_indicators: how many.
    """

    @property
    def num_indicators(self) -> int: ...

    def indicators(self) -> Float[Array, "rows D"]:
        """The rows."""
        ...
