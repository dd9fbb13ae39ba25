"""The one place where a config becomes modules, a processor, a data source and a token count.

Derived values are computed here and nowhere else: the encoder's grid from the image's size, the
connector's own fields from the token budget, widths and vocabulary from each other.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError, check_keys, choose, convert, parse
from vlm_jax.connectors import CONNECTORS
from vlm_jax.data import SOURCES
from vlm_jax.data.source import Settings, Source, Tools
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.image import open_image
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.vqa import VqaProcessor
from vlm_jax.reducers import REDUCERS
from vlm_jax.types import Batch, Grid

# Every key of a run's config; the last ones are read by the trainer and the evaluation.
KEYS = ("seed", "dtype", "param_dtype", "token_budget", "data", "processor", "encoder", "reducer", "connector",
        "decoder", "schedule", "stages", "optimizer", "loop", "mesh", "evaluation")  # fmt: skip
PARTS = ("encoder", "connector", "decoder")
CELL_HEAD = "cell_head"


@dataclasses.dataclass(frozen=True)
class ProcessorSettings:
    """`config.processor`: how pictures and text become rows.

    Attributes:
      image_size: (height, width) in pixels at full budget.
      mean: per channel on [0, 1], taken off the pixels.
      std: per channel on [0, 1], divides them.
      filter: resampling filter, a key of `processors.image.FILTERS`.
      tokenizer: `digits` for the built-in vocabulary of the digit pages, else a tokenizer.json.
      independent_turns: whether the turns of a training row are answered each by itself.
      max_text_length: text positions of a training row, visual tokens not counted.
      max_question_length: text positions of a prompt, visual tokens not counted.
      max_answer_length: new tokens of a generated answer, its end token among them.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str
    tokenizer: str
    independent_turns: bool
    max_text_length: int
    max_question_length: int
    max_answer_length: int


@dataclasses.dataclass(frozen=True)
class System:
    """Everything that a config describes; nothing in it has parameters yet.

    Attributes:
      model: the vision-language model.
      cell_reader: its encoder under a dense head, where a stage's objective is `read_cells`.
      processor: makes rows of samples.
      source: where samples come from; `open_source` reads it.
      grid: rows and columns of patches that the encoder gives.
      num_visual_tokens: tokens of one image that reach the decoder.
    """

    model: VLM
    cell_reader: CellReader | None
    processor: VqaProcessor
    source: Settings
    grid: Grid
    num_visual_tokens: int

    def open_source(self) -> Source:
        """Reads the data; pictures go through the processor, boxes are spelled in Qwen-VL's way."""
        return self.source.open(Tools(format_box, open_image, self.processor.prepare_image))

    def example(self) -> Batch:
        """Shapes of one training row with its images, for `eval_shape`."""
        length = self.processor.max_length
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        pixels = (1, self.processor.num_images, *self.processor.image_size, self.processor.channels)
        weights = jax.ShapeDtypeStruct((1, length), jnp.float32)
        return Batch(
            row, row, row, row, images=jax.ShapeDtypeStruct(pixels, jnp.float32), targets=row, loss_weights=weights
        )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Boxed parameters {part: tree}, drawn so that a part does not depend on its neighbours' kinds."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.example())
        params = dict(self.model.init({"params": key, "reduce": key}, zeros)["params"])
        if self.cell_reader is not None:
            head = self.cell_reader.init(key, zeros.images[:, 0])["params"]
            params[CELL_HEAD] = {name: tree for name, tree in head.items() if name != "encoder"}
        return params

    def num_params(self) -> dict[str, int]:
        """Parameters of each part of the model, counted by shape."""
        shapes = nn.meta.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        return {part: sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) for part in PARTS if part in shapes}


def build(config: Any) -> System:
    """Makes the system that a run's config describes.

    Args:
      config: a ConfigDict with the sections of `configs/base.py`.

    Raises:
      ConfigError: an unknown, unused, missing or ill-typed key, or sizes that do not fit.
      InfeasibleBudget: the reducer or the connector cannot meet `config.token_budget`.
    """
    check_keys(config, KEYS, "config")
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise ConfigError("\n".join(f"config.{key}: missing; see configs/base.py" for key in missing))
    settings = parse(ProcessorSettings, config.processor, "config.processor")
    source = _parse_kind(SOURCES, config.data, "config.data")
    tokenizer = digits_tokenizer() if settings.tokenizer == "digits" else Tokenizer.from_file(settings.tokenizer)
    dtypes = {"dtype": _dtype(config, "dtype"), "param_dtype": _dtype(config, "param_dtype")}

    encoder = _encoder(config.encoder, "config.encoder", settings.image_size, dtypes)
    decoder = _parse_kind(DECODERS, config.decoder, "config.decoder", vocab_size=tokenizer.vocab_size, **dtypes)
    full_grid = encoder.grid(*settings.image_size)
    budget = _positive(config.token_budget, "config.token_budget")

    image_size, grid, connector_grid = settings.image_size, full_grid, full_grid
    reducer_class = choose(REDUCERS, config.reducer.kind, "config.reducer.kind")
    reducer = None
    if reducer_class is None:
        _parse_kind({"none": _NoFields}, config.reducer, "config.reducer")
    else:
        solved = reducer_class.for_budget(budget, full_grid)
        reducer = _parse_kind(REDUCERS, config.reducer, "config.reducer", **solved)
        image_size = reducer.image_size(*settings.image_size, full_grid)
        grid = encoder.grid(*image_size)
        connector_grid = reducer.reduced_grid(grid)
    connector_class = choose(CONNECTORS, config.connector.kind, "config.connector.kind")
    solved = connector_class.for_budget(budget, connector_grid)
    connector = _parse_kind(
        CONNECTORS, config.connector, "config.connector", features=decoder.width, **solved, **dtypes
    )
    realised = connector.num_tokens(connector_grid)
    if realised != budget:
        raise InfeasibleBudget(f"{config.connector.kind} solved a budget of {budget} tokens but gives {realised}")

    visual = source.num_images * realised
    processor = VqaProcessor(
        tokenizer=tokenizer,
        image_size=image_size,
        channels=source.channels,
        mean=settings.mean,
        std=settings.std,
        filter=settings.filter,
        num_visual_tokens=realised,
        num_images=source.num_images,
        independent_turns=settings.independent_turns,
        max_length=visual + settings.max_text_length,
        max_prompt_length=visual + settings.max_question_length,
        max_answer_length=settings.max_answer_length,
    )
    return System(
        model=VLM(encoder, connector, decoder, reducer),
        cell_reader=_cell_reader(config, encoder, source, grid),
        processor=processor,
        source=source,
        grid=grid,
        num_visual_tokens=realised,
    )


@dataclasses.dataclass(frozen=True)
class _NoFields:
    """Settings of a kind without any."""


def _cell_reader(config: Any, encoder: Any, source: Settings, grid: Grid) -> CellReader | None:
    wanting = [label for label in config.schedule if config.stages.get(label, {}).get("objective") == "read_cells"]
    if not wanting:
        return None
    if source.cells is None:
        raise ConfigError(f"config.stages.{wanting[0]}.objective: config.data.kind {config.data.kind} has no cells")
    if any(side % cells for side, cells in zip(grid, source.cells, strict=True)):
        raise ConfigError(
            f"config.stages.{wanting[0]}.objective: {source.cells} cells do not divide the encoder's {grid} patches; "
            "change config.encoder.patch_size"
        )
    return CellReader(encoder, source.cells, source.num_classes)


def _encoder(section: Any, path: str, image_size: tuple[int, int], dtypes: dict[str, Any]) -> nn.Module:
    """An encoder. One made of encoders has a section for each, which may set an `image_size` of its own."""
    if "kind" not in section or section["kind"] not in COMPOSITE_ENCODERS:
        return _parse_kind({**ENCODERS, **COMPOSITE_ENCODERS}, section, path, image_size=image_size, **dtypes)
    hints = typing.get_type_hints(COMPOSITE_ENCODERS[section["kind"]])
    parts = {}
    for name in (field for field, hint in hints.items() if hint is nn.Module):
        if name not in section or not hasattr(section[name], "items"):
            raise ConfigError(f"{path}.{name}: expected the section of an encoder, with its kind")
        inner, size = dict(section[name].items()), image_size
        if "image_size" in inner:
            size = convert(inner.pop("image_size"), tuple[int, int], f"{path}.{name}.image_size")
        parts[name] = _encoder(inner, f"{path}.{name}", size, dtypes)
    rest = {key: section[key] for key in section if key not in parts}
    if rest.get("combine") == "tuple":
        raise ConfigError(f"{path}.combine: 'tuple' gives two sets of features; 'feature' gives hybrid_mlp both as one")
    return _parse_kind(COMPOSITE_ENCODERS, rest, path, **parts)


def _parse_kind(table: dict[str, Any], section: Any, path: str, **derived: Any) -> Any:
    if "kind" not in section:
        raise ConfigError(f"{path}.kind: missing; one of {', '.join(table)}")
    cls = choose(table, section["kind"], f"{path}.kind")
    return parse(cls, {key: section[key] for key in section if key != "kind"}, path, **derived)


def _dtype(config: Any, key: str) -> Any:
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return choose(known, config[key], f"config.{key}")


def _positive(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: expected a positive integer, got {value!r}")
    return value
