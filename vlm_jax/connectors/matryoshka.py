"""One training for many budgets: nested tokens of any pooling or query connector."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid, refuse
from vlm_jax.config import ConfigError, choose, parse
from vlm_jax.connectors.c_abstractor import CAbstractor
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.connectors.perceiver import Perceiver
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.qformer import QFormer
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.ranges import Count, Size
from vlm_jax.types import Config, Dtype, Fields, Grid, VisualFeatures, VisualTokens

# Connectors that average windows, which nest where grids divide each other, and query connectors, which use the first.
POOLING = {"pool": Pool, "ldp_v2": LDPv2, "c_abstractor": CAbstractor}
QUERIES = {"resampler": Resampler, "perceiver": Perceiver, "qformer": QFormer}
_PATH = "config.connector.inner"


class Matryoshka(nn.Module):
    """A connector whose parameters serve several budgets.

    In training every call samples one of the budgets up to `token_budget`, for all images, from the rng stream
    `connect`; tokens beyond it are masked, so that shapes are constant. With `deterministic` it returns
    `token_budget` tokens.

    Attributes:
      features: the decoder's width D.
      inner: config section of the inner connector: its kind, from POOLING or QUERIES, and its settings.
      budgets: nested budgets, ascending. Grids of a pooling kind divide each other; the largest budget is the
        number of queries of a query kind.
      token_budget: the largest of them used in training, and the one used at inference.
      members: the inner connector's fields for each budget, solved from the grid.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Cai et al. 2024 (Matryoshka Multimodal Models), section 3, for pooling; Hu et al. 2024 (Matryoshka
    Query Transformer), section 3.2, for queries. They sample from, or average over, a fixed
    set of budgets; here `budgets` is sampled uniformly.
    """

    features: Size
    inner: Config
    budgets: tuple[Count, ...]
    token_budget: Count
    members: tuple[Config, ...]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """The tokens of the inner connector at `token_budget`."""
        with _by_name():
            return self._member(self.token_budget).num_tokens(grid)

    def token_grid(self, grid: Grid) -> Grid | None:
        """The token grid of the inner connector at `token_budget`."""
        with _by_name():
            return self._member(self.token_budget).token_grid(grid)

    @classmethod
    def for_budget(
        cls,
        budget: int,
        grid: Grid,
        *,
        inner: Config = FrozenDict(kind="pool"),  # noqa: B008 (frozen)
        budgets: tuple[int, ...] | None = None,
    ) -> Fields:
        """The inner connector's fields for each of `budgets`, which must include the budget.

        Args:
          budget: number of tokens.
          grid: rows and columns of the features.
          inner: the inner connector's config section.
          budgets: the nested budgets; None for the budget and its repeated halves, as far as they are nested.

        Raises:
          ConfigError: the inner section has no kind that supports nesting.
          InfeasibleBudget: the budget is not in `budgets`, or the inner connector cannot meet one of them.
        """
        nested = tuple(sorted(set(budgets))) if budgets else _halves(budget, grid, inner)
        if budget not in nested:
            raise refuse("matryoshka", budget, grid, nested, f"its nested budgets are {nested}")
        with _by_name():
            members = _solve(nested, grid, inner)
        fields = {"budgets": nested, "token_budget": budget, "members": tuple(map(FrozenDict, members))}
        return {"inner": FrozenDict(inner), **fields}

    def _member(self, budget: int) -> nn.Module:
        """An unbound inner connector for `budget` tokens."""
        settings = {key: value for key, value in self.inner.items() if key != "kind"}
        settings |= {"features": self.features, "dtype": self.dtype, "param_dtype": self.param_dtype, "parent": None}
        kind = {**POOLING, **QUERIES}[self.inner["kind"]]
        return kind(**settings, **self.members[self.budgets.index(budget)])

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        largest = self._member(self.budgets[-1])
        with _by_name():
            if self.has_variable("params", "inner"):  # it may have adapters, which those at initialisation have not
                params = nn.meta.unbox(self.get_variable("params", "inner"))
            else:
                params = self.param("inner", lambda key: largest.init(key, features, deterministic=True)["params"])

        def give(budget: int) -> VisualTokens:
            with _by_name():
                tokens = self._member(budget).apply({"params": params}, features, deterministic=deterministic)
            missing = (0, self.token_budget - budget)
            padded = jnp.pad(tokens.tokens, ((0, 0), missing, (0, 0)))  # type: ignore[union-attr]
            return VisualTokens(padded, jnp.pad(tokens.mask, ((0, 0), missing)))  # type: ignore[union-attr]

        nested = [budget for budget in self.budgets if budget <= self.token_budget]
        if deterministic or len(nested) == 1:
            return give(self.token_budget)
        drawn = jax.random.randint(self.make_rng("connect"), (), 0, len(nested))
        return jax.lax.switch(drawn, [lambda budget=budget: give(budget) for budget in nested])


@contextlib.contextmanager
def _by_name() -> Iterator[None]:
    """Makes errors of the inner connector begin with this connector's name."""
    try:
        yield
    except (InfeasibleBudget, InfeasibleGrid) as error:
        raise type(error)(f"matryoshka: {error}") from error


def _solve(budgets: tuple[int, ...], grid: Grid, inner: Config) -> list[Fields]:
    """The inner connector's fields for every budget, with shared parameters and nested tokens."""
    if "kind" not in inner:
        raise ConfigError(f"{_PATH}.kind: missing; one of {', '.join([*POOLING, *QUERIES])}")
    kind = choose({**POOLING, **QUERIES}, inner["kind"], f"{_PATH}.kind")
    if inner["kind"] in QUERIES:
        members = [{**kind.for_budget(budgets[-1], grid), "num_used": budget} for budget in budgets]
        kind.for_budget(budgets[0], grid)
    else:
        members = [kind.for_budget(budget, grid) for budget in budgets]
        grids = [member["output_grid"] for member in members]
        for coarse, fine in itertools.pairwise(grids):
            if any(b % a for a, b in zip(coarse, fine, strict=True)):
                raise InfeasibleBudget(
                    f"config.connector.budgets: {inner['kind']} gives {coarse[0]}x{coarse[1]} and {fine[0]}x{fine[1]} "
                    f"tokens for a {grid[0]}x{grid[1]} grid, which are not nested; choose budgets whose grids divide"
                )
    section = {key: value for key, value in inner.items() if key != "kind"}
    known = {field.name for field in dataclasses.fields(kind)}
    derived = {"features": 1, "dtype": None, "param_dtype": None, **members[0]}
    parse(kind, section, _PATH, **{key: value for key, value in derived.items() if key in known})
    return members


def _halves(budget: int, grid: Grid, inner: Config) -> tuple[int, ...]:
    """The budget, its half, and so on, as long as they are integers and nested."""
    found = (budget,)
    while found[0] > 1 and found[0] % 2 == 0:
        try:
            _solve((found[0] // 2, *found), grid, inner)
        except InfeasibleBudget:
            break
        found = (found[0] // 2, *found)
    return found
