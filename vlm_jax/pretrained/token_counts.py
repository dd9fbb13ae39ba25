"""How many visual tokens an image takes in each system, from its files alone: no weight is read, no image decoded."""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import did_you_mean
from vlm_jax.models.vlm import VLM
from vlm_jax.paths import absolute
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.budgets import budgeted_views
from vlm_jax.pretrained.family import PretrainedError, marker
from vlm_jax.pretrained.known import describe_known, known_config, known_configs
from vlm_jax.pretrained.known_system import known_system
from vlm_jax.pretrained.loader import open_system
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import NoViews, Views

# (height, width) in pixels: inputs of towers, screens, a photograph, a page of 300 dots an inch, and a long receipt.
SIZES: tuple[Size, ...] = (
    *((224, 224), (336, 336), (448, 448), (480, 640), (1024, 1024), (720, 1280), (1080, 1920), (3024, 4032)),
    *((3508, 2480), (2400, 600)),
)

NO_IMAGES = "has no conversations with images, which are counted; name a whole system"


class Counted(NamedTuple):
    """Visual tokens of images in one system, or in several that take the same.

    Attributes:
      releases: names on the hub, or folders.
      tokens: of each image, learned rows included; None where the budget cannot be met by the image alone.
    """

    releases: tuple[str, ...]
    tokens: tuple[int | None, ...]


def count_tokens(release: str, sizes: Sequence[Size], token_budget: int | None = None) -> tuple[int | None, ...]:
    """Visual tokens of one image of each size.

    Args:
      release: one of `known.known_configs`, or a folder.
      sizes: (height, width) in pixels.
      token_budget: maximum of an image, met as in `budgets.budgeted_views`; None for the release's own.

    Returns:
      A number for each size; None where even the smallest image exceeds the budget, which then takes a reducer or
      another connector.

    Raises:
      PretrainedError: neither a known name nor a folder, or a model that takes no images in conversations.
    """
    views = _views(release)
    if token_budget is not None:
        try:
            views = budgeted_views(views, token_budget)
        except InfeasibleBudget:
            return (None,) * len(sizes)
    return tuple(len(views.layouts([size])[0]) for size in sizes)


@functools.lru_cache(256)
def _views(release: str) -> Views:
    """The views of a system whose conversations have images."""
    if release in known_configs():
        if not _has_images(release):
            raise PretrainedError(f"{release}: {NO_IMAGES}")
        return known_system(release, dtype=jnp.float32, param_dtype=jnp.float32).processor.views
    folder = absolute(release)
    if not pathlib.Path(folder).exists():
        raise PretrainedError(
            f"expected a folder, or an included config, got '{release}'{did_you_mean(release, known_configs())}"
        )
    system = open_system(folder, FAMILIES, dtype="float32", param_dtype="float32")
    if not isinstance(system.model, VLM) or isinstance(system.processor.views, NoViews):
        raise PretrainedError(f"{release}: {NO_IMAGES}")
    return system.processor.views


def conversational() -> Iterator[str]:
    """Included releases whose conversations have images, in alphabetical order."""
    return filter(_has_images, known_configs())


def _has_images(name: str) -> bool:
    model = describe_known(name).module
    return isinstance(model, VLM) and model.encoder is not None


def count_all(
    releases: Sequence[str] | None = None, sizes: Sequence[Size] = SIZES, token_budget: int | None = None
) -> list[Counted]:
    """`count_tokens` of several systems; included releases of one model type that take the same are one row.

    Args:
      releases: names and folders; all included ones when None.
      sizes: (height, width) in pixels.
      token_budget: as in `count_tokens`.

    Raises:
      PretrainedError: as `count_tokens`.
    """
    rows: dict[tuple[str, tuple[int | None, ...]], list[str]] = {}
    for name in conversational() if releases is None else releases:
        kind = marker(known_config(name)) if name in known_configs() else name
        rows.setdefault((kind, count_tokens(name, sizes, token_budget)), []).append(name)
    return [Counted(tuple(names), tokens) for (_, tokens), names in rows.items()]


def markdown(rows: Sequence[Counted], sizes: Sequence[Size] = SIZES) -> str:
    """A table with a column for each size, written width x height; of many releases of a row it names the first."""
    heads = ("release", *(f"{width}x{height}" for height, width in sizes))
    lines = [heads, ("---", *["---:"] * len(sizes))]
    for releases, tokens in rows:
        names = ", ".join(f"`{name}`" for name in releases)
        if len(releases) > 2:
            names = f"`{releases[0]}` and {len(releases) - 1} more"
        lines.append((names, *("-" if count is None else f"{count:,}" for count in tokens)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
