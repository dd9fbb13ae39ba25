"""Builds encoder, reducer, connector and views from the sections of a config, for its token budget."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from vlm_jax.budget import InfeasibleBudget, share
from vlm_jax.build.settings import ProcessorSettings
from vlm_jax.config import ConfigError, RunConfig, choose, choose_kind, convert, hints_of, parse, parse_kind
from vlm_jax.connectors import CONNECTORS, PACKED_CONNECTORS
from vlm_jax.connectors.connector import Connector
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.encoders.encoder import Encoder, ImageEncoder
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.patches import packed_length
from vlm_jax.processors.smart_resize import bounded_size
from vlm_jax.processors.tiles import FixedTilesViews
from vlm_jax.processors.views import Views
from vlm_jax.ranges import Side, Size
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.types import Fields, Grid


@dataclasses.dataclass(frozen=True)
class Vision:
    """The visual parts of a system, solved for its token budget.

    Attributes:
      encoder, reducer, connector: as in `VLM`.
      views: preprocessing of images.
      grid: rows and columns of patches of one view; None where every image has its own.
      num_tokens: visual tokens of an image with all its tiles, or of a whole clip, that enter the decoder;
        the maximum where every image has its own grid.
      num_left: number of them that reach the decoder's last layers.
      load: tiles, or positions of packed patches, of an image with all its tiles, or of a whole clip.
      num_views: views of an image that share these equally; 1 where every image has its own grid.
    """

    encoder: Encoder
    reducer: Reducer | None
    connector: Connector
    views: Views
    grid: Grid | None
    num_tokens: int
    num_left: int
    load: int
    num_views: int = 1


def solve_vision(
    config: RunConfig, settings: ProcessorSettings, channels: int, decoder: Decoder, dtypes: Fields
) -> Vision:
    """The visual parts of `config`, solved for `config.token_budget`.

    Args:
      config: a run's config.
      settings: its section `processor`.
      channels: channels of the images.
      decoder: provides its width, and its depth where tokens are dropped inside.
      dtypes: `dtype` and `param_dtype` of the modules.

    Raises:
      ConfigError: incompatible settings.
      InfeasibleBudget: the reducer or the connector cannot meet the budget.
    """
    kind = choose_kind({**ENCODERS, **COMPOSITE_ENCODERS, **PACKED_ENCODERS}, config.encoder, "config.encoder")
    solve = _native if kind in PACKED_ENCODERS.values() else _tiled
    return solve(config, settings, channels, decoder, dtypes)


def _tiled(config: RunConfig, settings: ProcessorSettings, channels: int, decoder: Decoder, dtypes: Fields) -> Vision:
    """Views of one size: the reducer or the connector meets the budget, view by view."""
    size, pixels = settings.image_size, settings.pixels(channels)
    if size is None:
        raise ConfigError(
            "config.processor.image_size: expected (height, width) for config.encoder.kind "
            f"{config.encoder.kind}, got None"
        )
    if settings.min_tokens != 1:
        raise ConfigError(
            "config.processor.min_tokens: is for encoders that pack images of any size; remove the key, or "
            f"choose one of {', '.join(PACKED_ENCODERS)}"
        )
    encoder = build_encoder(config.encoder, "config.encoder", size, dtypes)
    full_grid = encoder.grid(*size)
    num_views = (settings.tiles[0] * settings.tiles[1] + settings.thumbnail) * (settings.frames or 1)

    def solve(budget: int) -> Vision:
        reducer = _reducer(config.reducer, budget, full_grid, encoder, decoder, settings)
        reduced_size = size if reducer is None else reducer.image_size(*size, full_grid)
        grid = encoder.grid(*reduced_size)
        connector_grid = grid if reducer is None else reducer.reduced_grid(grid)
        wanted = budget if reducer is None else reducer.connector_budget(grid)
        connector_class = choose(CONNECTORS, config.connector.kind, "config.connector.kind")
        asked, section = _asked(connector_class.for_budget, connector_class, config.connector, "config.connector")
        solved = connector_class.for_budget(wanted, connector_grid, **asked)
        connector = parse_kind(CONNECTORS, section, "config.connector", **solved, features=decoder.width, **dtypes)
        realised = connector.num_tokens(connector_grid)
        if realised != wanted:
            raise InfeasibleBudget(f"{config.connector.kind} solved a budget of {wanted} tokens but gives {realised}")
        views = FixedTilesViews(pixels, reduced_size, realised, settings.tiles, settings.thumbnail)
        counts = num_views * realised, num_views * budget
        return Vision(encoder, reducer, connector, views, grid, *counts, load=num_views, num_views=num_views)

    return _share(config, settings, num_views, full_grid[0] * full_grid[1], solve)


def _native(config: Any, settings: ProcessorSettings, channels: int, decoder: Any, dtypes: Fields) -> Vision:
    """Views of any size, packed into one sequence: the processor meets the budget, which bounds the image size."""
    kind, connector_kind = config.encoder.kind, config.connector.kind
    for key, only in (("image_size", None), ("tiles", (1, 1)), ("thumbnail", False)):
        if getattr(settings, key) != only:
            raise ConfigError(f"config.processor.{key}: set it to {only}; {kind} takes images of any size")
    if choose(REDUCERS, config.reducer.kind, "config.reducer.kind") is not None:
        raise ConfigError(
            f"config.reducer.kind: {config.reducer.kind} reduces image by image, but {kind} packs several into a "
            "sequence; set it to none: config.token_budget bounds the size of the images"
        )
    parse_kind({"none": _NoFields}, config.reducer, "config.reducer")
    connector_class = choose(CONNECTORS, connector_kind, "config.connector.kind")
    if connector_kind not in PACKED_CONNECTORS:
        raise ConfigError(
            f"config.connector.kind: {connector_kind} needs one image's grid, but {kind} packs several images into a "
            f"sequence; choose one of {', '.join(PACKED_CONNECTORS)}"
        )
    encoder = parse_kind(PACKED_ENCODERS, config.encoder, "config.encoder", channels=channels, **dtypes)
    form, pixels = encoder.patch_format, settings.pixels(channels)
    block = encoder.grid(form.block_size, form.block_size)  # sides of an image are multiples of a block's
    solved = _fewest(connector_class, block)
    connector = parse_kind(CONNECTORS, config.connector, "config.connector", **solved, features=decoder.width, **dtypes)
    block_tokens, num_slots = connector.num_tokens(block), form.num_slots(settings.frames or 1)

    def solve(budget: int) -> Vision:
        if budget % block_tokens or budget < settings.min_tokens:
            raise InfeasibleBudget(
                f"config.token_budget: {kind} cannot bound an image by {budget} tokens: they are in blocks of "
                f"{block_tokens} and at least config.processor.min_tokens={settings.min_tokens}"
            )
        most, least = budget // block_tokens, -(-settings.min_tokens // block_tokens)
        unit = form.block_size**2
        views = NativeViews(pixels, form, bounded_size, least * unit, most * unit, block_tokens)
        load = packed_length(num_slots * most, form, num_slots)
        return Vision(encoder, None, connector, views, None, num_slots * budget, num_slots * budget, load)

    return _share(config, settings, num_slots, 2 * config.token_budget, solve)


def _asked(function: Any, cls: Any, section: Any, path: str) -> tuple[Fields, Fields]:
    """The keys of a section that are keyword arguments of a function, converted, and the section without them."""
    named = inspect.signature(function).parameters.values()
    keywords = [argument.name for argument in named if argument.kind is argument.KEYWORD_ONLY]
    hints = hints_of(cls)
    asked = {key: convert(section[key], hints[key], f"{path}.{key}") for key in section if key in keywords}
    return asked, {key: section[key] for key in section if key not in asked}


def _fewest(connector_class: Any, grid: Grid) -> Fields:
    """The fields of a connector with the fewest possible tokens for a grid."""
    for budget in range(1, grid[0] * grid[1]):
        try:
            return connector_class.for_budget(budget, grid)
        except InfeasibleBudget:
            continue
    return connector_class.for_budget(grid[0] * grid[1], grid)


def _share(
    config: RunConfig, settings: ProcessorSettings, num_views: int, largest: int, solve: Callable[[int], Vision]
) -> Vision:
    """Solves `config.token_budget` for one of the views of an image.

    Args:
      config: provides the budget and its unit.
      settings: provides the frames of a clip.
      num_views: tiles of an image, over all frames of a clip.
      largest: largest budget of a view to suggest in errors.
      solve: solves the budget of a view.
    """
    budget = convert(config.token_budget, Size, "config.token_budget")
    per_frame = Fraction(num_views, settings.frames or 1)
    units = {"image": Fraction(num_views), "frame": per_frame, "tile": Fraction(1)}
    views = choose(units, config.token_budget_per, "config.token_budget_per")
    if config.token_budget_per == "frame" and settings.frames is None:
        raise ConfigError("config.token_budget_per: there are no frames; set config.processor.frames, or choose image")
    return share(budget, views, largest, solve)


def _reducer(
    section: RunConfig, budget: int, grid: Grid, encoder: Encoder, decoder: Decoder, settings: ProcessorSettings
) -> Reducer | None:
    """The reducer solved for a budget and a full-size grid, or None for `none`."""
    reducer_class = choose(REDUCERS, section.kind, "config.reducer.kind")
    if reducer_class is None:
        parse_kind({"none": _NoFields}, section, "config.reducer")
        return None
    if reducer_class.guided_by is not None:
        raise ConfigError(
            f"config.reducer.kind: {section.kind} compares the image with the question as its CLIP embeds both, and a "
            "model of a config has no CLIP; set config.release to one with a CLIP's tower, or choose another reducer"
        )
    part = reducer_class.reduces_in
    depth = encoder.num_blocks if part == "encoder" else decoder.depth if part == "decoder" else 0
    solved = reducer_class.for_budget(budget, grid, depth)
    if reducer_class.reduces_clips:
        if settings.frames is not None and (settings.tiles != (1, 1) or settings.thumbnail):
            raise ConfigError(
                f"config.reducer.kind: {section.kind} compares whole frames, but they are cut into tiles; set "
                "config.processor.tiles to (1, 1) and config.processor.thumbnail to False"
            )
        solved["frames"] = settings.frames or 1
    fields = {key: section[key] for key in section if key != "kind"}
    return parse(reducer_class, fields, "config.reducer", **solved)


@dataclasses.dataclass(frozen=True)
class _NoFields:
    """Settings of a kind without fields."""


def build_encoder(section: RunConfig, path: str, image_size: tuple[int, int], dtypes: Fields) -> Encoder:
    """Builds an encoder; a composite one has a section per encoder.

    Args:
      section: its keys. `image_size` in it is that of the position table, which is then
        interpolated to the images.
      path: path of the section.
      image_size: (height, width) in pixels of the images.
      dtypes: `dtype` and `param_dtype`.
    """
    section = dict(section.items())
    if "image_size" in section:
        image_size = convert(section.pop("image_size"), tuple[Side, Side], f"{path}.image_size")
    if "kind" not in section or section["kind"] not in COMPOSITE_ENCODERS:
        return parse_kind({**ENCODERS, **COMPOSITE_ENCODERS}, section, path, image_size=image_size, **dtypes)
    hints = typing.get_type_hints(COMPOSITE_ENCODERS[section["kind"]])
    parts = {}
    for name in (field for field, hint in hints.items() if hint is ImageEncoder):
        if name not in section or not hasattr(section[name], "items"):
            raise ConfigError(f"{path}.{name}: expected the section of an encoder, with its kind")
        shown = image_size
        if section["kind"] == "cascade" and name == "second":  # sees a map of features
            shown = parts["first"].grid(*image_size)
        parts[name] = build_encoder(section[name], f"{path}.{name}", shown, dtypes)
    rest = {key: section[key] for key in section if key not in parts}
    if rest.get("combine") == "tuple":
        raise ConfigError(
            f"{path}.combine: 'tuple' returns two feature maps; use 'feature', which joins them, with hybrid_mlp"
        )
    own = {name: dtype for name, dtype in dtypes.items() if name in hints}  # of an encoder with parameters of its own
    return parse_kind(COMPOSITE_ENCODERS, rest, path, **parts, **own)
