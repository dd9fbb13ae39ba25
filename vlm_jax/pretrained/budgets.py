"""Token budgets for releases: a bound by smaller images, or an exact number by a reducer or another connector."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid
from vlm_jax.config import ConfigError, choose, parse, parse_kind
from vlm_jax.connectors import CONNECTORS, PACKED_CONNECTORS
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.encoders import PACKED_ENCODERS
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.merging_vit import MergingViT
from vlm_jax.layers.learned_rows import LearnedRows
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.guide import clip_guide
from vlm_jax.pretrained.smaller_tile import smaller_tile
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.downsampled import DownsampledViews, TiledViews
from vlm_jax.processors.filled import FilledViews
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.question import QuestionTexts
from vlm_jax.processors.reduction import Reduction
from vlm_jax.processors.sliced import SlicedViews
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.views import Tiles, Views
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.reducers.reducer import GuidedReducer, Reducer
from vlm_jax.system import System
from vlm_jax.types import Config, Fields, Grid, Question

Part = TypeVar("Part", Encoder, Decoder)
Section = str | Config  # a kind, or a section with its kind and settings


def with_budget(
    system: System,
    tokens: int | None,
    *,
    reducer: Section | None = None,
    connector: Section | None = None,
    path: str = "config",
) -> System:
    """The system with a token budget.

    Args:
      system: of a release, with an encoder, a connector and a decoder.
      tokens: without a reducer or a connector a bound for an image with all its tiles, met by fewer tiles or
        pixels; with one of them the exact number for a tile. For an image that is packed at its own resolution it is
        the exact number with a reducer (or fewer if it has fewer), and a bound with another connector. None
        keeps the release's number, or that of the sections.
      reducer: a training-free reducer, without parameters of its own; one that chooses by the question reads parts of a
        CLIP, which become the model's `guide`. Where positions have three axes, tokens keep theirs
        unless the section says otherwise. `downsample_image` shows the encoder fewer pixels, of each tile as it is
        made as released, and is a bound for a packed picture.
      connector: takes the place of the release's own; its parameters are drawn anew. One without levels leaves out
        what the release adds to its decoder's first layers (DeepStack).
      path: of the config that the sections are from, for messages.

    Raises:
      InfeasibleBudget: the budget cannot be met; the message has the nearest ones, or the fixed number.
      ConfigError: the reducer or the connector is incompatible with the system; the message has the reason.
    """
    model, processor = system.model, system.processor
    if not isinstance(model, VLM) or model.encoder is None or model.connector is None or model.decoder is None:
        raise ConfigError(f"{path}.token_budget: this model has no encoder with a decoder; leave it out")
    if processor.reduction is not None or isinstance(processor.views, DownsampledViews):
        raise ConfigError(f"{path}.token_budget: this system has a reducer already; start from the release without it")
    reduces = reducer is not None and _section(reducer).get("kind") != "none"
    if connector is not None or reduces:
        model = _with_joined_features(model)
    if connector is not None:
        system = _with_connector(system, model, tokens, _section(connector), f"{path}.connector")
        if not reduces:
            return system
        model, processor = system.model, system.processor
        assert isinstance(model, VLM)
    if reduces:
        assert reducer is not None
        return _with_reducer(system, model, tokens, _section(reducer), f"{path}.reducer")
    if tokens is None:
        return system
    try:
        views = budgeted_views(processor.views, tokens)
    except InfeasibleBudget as error:
        fixed = isinstance(processor.views, SquareViews | CropViews)
        more = "; set a reducer or another connector, which meet a budget exactly" if fixed else ""
        raise InfeasibleBudget(f"{path}.token_budget: {error}{more}") from error
    if isinstance(views, SlicedViews) and isinstance(model.encoder, MergingViT):  # perhaps in another mode
        merges = views.format == model.encoder.clone(merges=True).patch_format
        system = dataclasses.replace(system, model=model.clone(encoder=model.encoder.clone(merges=merges)))
    return dataclasses.replace(system, make_processor=_returning(dataclasses.replace(processor, views=views)))


def budgeted_views(views: Views, tokens: int) -> Views:
    """Views whose images take at most `tokens`, by a mode or a budget of the release, fewer tiles or fewer pixels.

    Raises:
      InfeasibleBudget: the smallest image takes more.
    """
    if isinstance(views, FilledViews | SlicedViews):
        return views.of_budget(tokens)
    return views.of_mode(tokens) if isinstance(views, MosaicViews) else views.within(tokens)


def _section(section: Section) -> Fields:
    return {"kind": section} if isinstance(section, str) else dict(section)


def _with_joined_features(model: VLM) -> VLM:
    """The model with the features of two encoders joined, for a reducer or a connector that takes one feature map."""
    encoder = model.encoder
    if not isinstance(encoder, Hybrid) or encoder.combine != "tuple":
        return model
    return model.clone(encoder=encoder.clone(combine="feature"))


def _returning(processor: Processor) -> Callable[[], Processor]:
    return lambda: processor


def _grid_of_view(model: VLM, views: Views) -> Grid:
    """Rows and columns of features of a tile, or of a block of packed patches."""
    encoder = model.encoder
    assert encoder is not None
    if isinstance(views, NativeViews):
        return encoder.grid(views.format.block_size, views.format.block_size)
    assert isinstance(views, Tiles)
    return encoder.grid(*views.tile_shape[:2])


def _grid_of_part(model: VLM, views: MosaicViews) -> Grid | None:
    """Rows and columns of features of a tile that has another size than the view of the whole; None without tiles."""
    assert model.encoder is not None
    return None if views.mosaic is None else model.encoder.grid(views.mosaic.side, views.mosaic.side)


def _retokened(model: VLM, views: Views, grid: Grid, tokens_of: Callable[[Grid], Grid | int]) -> Views:
    """Views with the tokens that a connector makes of a grid of features, also of tiles of another size."""
    if not isinstance(views, MosaicViews):
        return views.retokened(tokens_of(grid))
    part = _grid_of_part(model, views)
    return views.retokened(tokens_of(grid), None if part is None else tokens_of(part))


def _reduced_views(model: VLM, views: Views, given: Grid, at_tokens: bool, num_left: Callable[[int], int]) -> Views:
    """Views with the tokens that a reducer leaves of each, laid out as before where it leaves all."""
    count = given[0] * given[1]
    left = num_left(count)
    if not isinstance(views, MosaicViews):
        return views if left == count else views.retokened(left)
    part = _grid_of_part(model, views)
    if part is None:
        return views if left == count else views.retokened(left)
    own = model.connector.num_tokens(part) if at_tokens else part[0] * part[1]  # type: ignore[union-attr]
    left_of_part = num_left(own)
    if (left, left_of_part) == (count, own):
        return views
    return views.retokened(left, left_of_part)


def _with_connector(system: System, model: VLM, tokens: int | None, section: Fields, path: str) -> System:
    processor, decoder = system.processor, model.decoder
    views, released, kind = processor.views, model.connector, section.get("kind")
    connector_class = choose(CONNECTORS, str(kind), f"{path}.kind")
    packed = isinstance(views, NativeViews)
    if packed and kind not in PACKED_CONNECTORS:
        raise ConfigError(
            f"{path}.kind: {kind} needs the grid of one image, but {type(model.encoder).__name__} packs several of "
            f"any size into a sequence; choose one of {', '.join(PACKED_CONNECTORS)}"
        )
    grid = _grid_of_view(model, views)
    budget = tokens
    if packed:
        budget = _fewest(connector_class, grid)
    elif budget is None:
        budget = released.num_tokens(grid)  # type: ignore[union-attr]
    named = inspect.signature(connector_class.for_budget).parameters.values()
    asked = {a.name: section[a.name] for a in named if a.kind is a.KEYWORD_ONLY and a.name in section}
    solved = connector_class.for_budget(budget, grid, **asked)
    rest = {key: value for key, value in section.items() if key not in asked}
    dtypes = {"dtype": released.dtype, "param_dtype": released.param_dtype}  # type: ignore[union-attr]
    encoder, levels = model.encoder, getattr(released, "levels", 0)
    if levels and hasattr(connector_class, "levels"):
        rest.setdefault("levels", levels)
    elif levels:  # which this connector does not read
        encoder = encoder.clone(levels=())  # type: ignore[union-attr]
    made = parse_kind(CONNECTORS, rest, path, **solved, features=decoder.width, **dtypes)  # type: ignore[union-attr]
    learned, drawn = model.learned_rows, ["connector"]
    if learned == "connector":  # rows of the release's own connector, which is replaced
        names = tuple(f"indicator_{number}" for number in range(model.num_learned_rows))
        learned = LearnedRows(names, decoder.width, **dtypes)  # type: ignore[union-attr]
        drawn.append("learned_rows")

    def tokens_of(grid: Grid) -> Grid | int:
        count, laid_out = made.num_tokens(grid), made.token_grid(grid)
        return count if laid_out is None or packed else laid_out

    try:
        views = _retokened(model, views, grid, tokens_of)
    except InfeasibleGrid as error:
        raise ConfigError(f"{path}.kind: {kind} does not take the features of a tile: {error}") from error
    if packed and tokens is not None:
        views = views.within(tokens)
    return dataclasses.replace(
        system,
        model=model.clone(encoder=encoder, connector=made, learned_rows=learned),
        make_processor=_returning(dataclasses.replace(processor, views=views)),
        release=None if system.release is None else system.release.without(*drawn),
    )


def _fewest(connector_class: Any, grid: Grid) -> int:
    """The smallest number of tokens that a connector can give for a block."""
    for budget in range(1, grid[0] * grid[1] + 1):
        try:
            connector_class.for_budget(budget, grid)
        except InfeasibleBudget:
            continue
        return budget
    return grid[0] * grid[1]


def _with_reducer(system: System, model: VLM, tokens: int | None, section: Fields, path: str) -> System:
    processor = system.processor
    views, kind = processor.views, str(section.get("kind"))
    reducer_class = choose(REDUCERS, kind, f"{path}.kind")
    assert reducer_class is not None  # `with_budget` has met "none"
    encoder, connector, decoder = model.encoder, model.connector, model.decoder
    packed = isinstance(encoder, tuple(PACKED_ENCODERS.values()))
    parts: Fields = {"encoder": encoder, "decoder": decoder}
    grid = _grid_of_view(model, views)
    laid_out = connector.token_grid(grid)  # type: ignore[union-attr]
    at_tokens = packed or laid_out != grid or section.get("rule", "exact") in reducer_class.on_tokens
    if kind == "downsample_image":
        return _with_smaller_pictures(system, model, tokens, section, path)
    if packed and reducer_class.reduces_in == "encoder":
        raise ConfigError(
            f"{path}.kind: {kind} merges tokens inside the encoder, which breaks the windows and blocks of "
            f"{type(encoder).__name__}; choose a reducer that acts on its merged tokens"
        )
    if at_tokens and reducer_class.reduces_in == "encoder":
        raise ConfigError(
            f"{path}.kind: {kind} merges tokens inside the encoder, but {type(connector).__name__} needs their grid; "
            "choose a reducer that acts after the connector"
        )
    if packed:
        assert isinstance(views, NativeViews)
        given: Grid = (1, views.most_tokens)
    else:
        given = (laid_out or (1, connector.num_tokens(grid))) if at_tokens else grid  # type: ignore[union-attr]
    part = None if reducer_class.reduces_in is None else parts[reducer_class.reduces_in]
    depth = 0 if part is None else _num_blocks(part)
    if part is not None and not depth:
        raise ConfigError(
            f"{path}.kind: {kind} works inside the {reducer_class.reduces_in}, but {type(part).__name__} has no blocks "
            "of its own; choose another reducer"
        )
    budget = tokens if tokens is not None else given[0] * given[1]
    if packed:
        budget = min(budget, given[1])
    solved = reducer_class.for_budget(budget, given, depth)
    if reducer_class.reduces_clips:
        solved["frames"] = 1  # a picture; packed videos have their own numbers
    if processor.rotary_3d:  # grounding depends on rows and columns
        section = {"positions": "keep", **section}
    if isinstance(views, MosaicViews):
        views = dataclasses.replace(views, modes=())  # the reducer's number of tokens is that of no mode
        keeps = section.get("positions") == "keep" and reducer_class.reduces_in != "decoder"
        if views.mosaic is not None and keeps:
            raise ConfigError(
                f"{path}.positions: expected consecutive where tiles have another size than the view of the whole, got "
                "keep"
            )
    made = parse(reducer_class, {key: section[key] for key in section if key != "kind"}, path, **solved)
    if at_tokens and laid_out is None and not packed and (made.required_fields().get("encoder") or made.guided_by):
        raise ConfigError(
            f"{path}.kind: {kind} ranks tokens by their patches, but the tokens of "
            f"{type(connector).__name__} are queries without a position; choose random, uniform_stride or divprune"
        )
    for name, fields in made.required_fields().items():
        parts[name] = _set(parts[name], fields, kind, name, path)
    in_decoder = made.reduces_in == "decoder"
    reduction = Reduction(
        before=views,
        num_left=None if in_decoder else made.num_left,
        drops=tuple(drop.num_left for drop in made.drops()) if isinstance(made, ReducesInDecoder) else (),
        keeps_positions=made.positions == "keep" and not in_decoder,
        is_packed=packed and not in_decoder,
        compares_frames=reducer_class.reduces_clips,
    )
    if not in_decoder:
        if packed:
            views = dataclasses.replace(views, num_left=made.num_left)  # type: ignore[type-var]
        else:
            views = _reduced_views(model, views, given, at_tokens, made.num_left)
    reduced = model.clone(
        encoder=parts["encoder"], decoder=parts["decoder"], reducer=made, reduce="tokens" if at_tokens else "features"
    )
    if not at_tokens and not in_decoder:
        _check_kept_by_connector(reduced, made, grid, path)
    if made.guided_by == "clip":
        assert isinstance(made, GuidedReducer)  # as every registered one that says so
        system, reduced, question = _guided(system, reduced, made, path)
        reduction = dataclasses.replace(reduction, question=question)
    made_processor = dataclasses.replace(processor, views=views, reduction=reduction)
    return dataclasses.replace(system, model=reduced, make_processor=_returning(made_processor))


def _guided(system: System, model: VLM, reducer: GuidedReducer, path: str) -> tuple[System, VLM, QuestionTexts]:
    """The system and the model with the guide that a reducer needs, and what makes ids of a question."""
    release = system.release
    assert release is not None and model.encoder is not None  # `with_budget` takes systems of releases
    found = clip_guide(model.encoder, reducer.text_model, release.config, release.folder, kind=reducer.kind, path=path)
    text = found.module.text
    question = QuestionTexts(
        found.tokenizer, text.context_length, reducer.question, text.vocab_size, segments=reducer.segments
    )
    (batch,) = system.inputs
    shapes = Question(
        jax.ShapeDtypeStruct((*batch.images.shape[:2], 1, text.context_length), jnp.int32),
        jax.ShapeDtypeStruct((*batch.images.shape[:2], 1), jnp.bool_),
    )
    release = dataclasses.replace(release, borrowed=(*release.borrowed, found.borrowed))
    inputs = (dataclasses.replace(batch, question=shapes),)
    return dataclasses.replace(system, inputs=inputs, release=release), model.clone(guide=found.module), question


def _with_smaller_pictures(system: System, model: VLM, tokens: int | None, section: Config, path: str) -> System:
    """Fewer pixels: a lower bound at native resolution or among modes, or smaller tiles, which have fewer patches.

    Tiles are cut and finished as released, and each is then resized to fewer pixels. Its tokens form a grid of about
    the released aspect, laid out as released, and each stands for as many patches as before: a connector that pools to
    a grid of its own pools to the smaller one. Tables of positions are interpolated by the encoder.
    """
    processor, views = system.processor, system.processor.views
    if tokens is None:
        raise ConfigError(f"{path}.kind: downsample_image needs a token_budget")
    if isinstance(views, NativeViews | MosaicViews):
        parse_kind(REDUCERS, section, path, output_grid=(1, 1))  # its other settings
        views = views.within(tokens) if isinstance(views, NativeViews) else views.of_mode(tokens)
    else:
        assert isinstance(views, TiledViews)
        tile = smaller_tile(model, views, _grid_of_view(model, views), tokens, section, path)
        model = model.clone(connector=tile.connector)
        if tile.size != views.tile_shape[:2]:
            views = DownsampledViews(views.retokened(tile.token_grid), tile.size)
    processor = dataclasses.replace(processor, views=views)
    return dataclasses.replace(system, model=model, make_processor=_returning(processor))


def _check_kept_by_connector(model: VLM, reducer: Reducer, grid: Grid, path: str) -> None:
    reduced, wanted = reducer.reduced_grid(grid), reducer.connector_budget(grid)
    try:
        found = model.connector.num_tokens(reduced)  # type: ignore[union-attr]
    except InfeasibleGrid as error:
        raise ConfigError(
            f"{path}.kind: {reducer.kind} returns a grid that the connector does not support: {error}"
        ) from error
    if found != wanted:
        raise ConfigError(
            f"{path}.kind: {reducer.kind} returns {wanted} features, for which the connector gives {found} tokens; "
            "choose another reducer"
        )


def _num_blocks(part: Encoder | Decoder) -> int:
    return part.num_blocks if isinstance(part, Encoder) else part.depth


def _set(part: Part, fields: Config, kind: str, name: str, path: str) -> Part:
    """The part with the fields that a reducer needs; its parameters are unchanged."""
    hints = typing.get_type_hints(type(part))
    if missing := [field for field in fields if field not in hints]:
        raise ConfigError(
            f"{path}.kind: {kind} works inside the {name}, but {type(part).__name__} does not support it (no field "
            f"{', '.join(missing)}); choose another reducer"
        )
    return part.clone(**fields)
