"""The one place where a config becomes modules, a processor, a data source and a token count.

Derived values are computed here and nowhere else: the encoder's grid from the image's size, the
connector's own fields from the token budget, widths and vocabulary from each other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError, check_keys, choose, parse, parse_kind
from vlm_jax.data import SOURCES
from vlm_jax.data.source import Settings, Source, Tools
from vlm_jax.decoders import DECODERS
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.image import open_image
from vlm_jax.processors.layout_tokenizer import LayoutTokenizer
from vlm_jax.processors.vqa import VqaProcessor
from vlm_jax.types import Batch, Grid
from vlm_jax.vision import ProcessorSettings, Vision, solve_vision

# Every key of a run's config; the last ones are read by the trainer and the evaluation.
KEYS = ("seed", "dtype", "param_dtype", "token_budget", "token_budget_per", "data", "processor", "encoder",
        "reducer", "connector", "decoder", "schedule", "stages", "optimizer", "loop", "mesh",
        "evaluation")  # fmt: skip
PARTS = ("encoder", "connector", "decoder")
CELL_HEAD = "cell_head"


@dataclasses.dataclass(frozen=True)
class System:
    """Everything that a config describes; nothing in it has parameters yet.

    Attributes:
      model: the vision-language model.
      cell_reader: its encoder under a dense head, where a stage's objective is `read_cells`.
      processor: makes rows of samples.
      source: where samples come from; `open_source` reads it.
      grid: rows and columns of patches that the encoder gives for one tile; None where every image has
        its own.
      num_visual_tokens: tokens of one image, with all its tiles or frames, that reach the decoder's last
        layers; the most that can where every image has a grid of its own.
      mean_visual_tokens: the mean over its layers, which is more where tokens are dropped on the way.
    """

    model: VLM
    cell_reader: CellReader | None
    processor: VqaProcessor
    source: Settings
    grid: Grid | None
    num_visual_tokens: int
    mean_visual_tokens: float

    def open_source(self) -> Source:
        """Reads the data; pictures go through the processor, boxes are spelled in Qwen-VL's way."""
        return self.source.open(Tools(format_box, open_image, self.processor.prepare_image))

    def example(self) -> Batch:
        """Shapes of one training row with its images, for `eval_shape`."""
        length = self.processor.max_length
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        images = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.processor.example_images())
        weights = jax.ShapeDtypeStruct((1, length), jnp.float32)
        return Batch(row, row, row, row, images=images, targets=row, loss_weights=weights)

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
    source = parse_kind(SOURCES, config.data, "config.data")
    tokenizer = digits_tokenizer()
    if settings.tokenizer != "digits":
        tokenizer = LayoutTokenizer.from_file(settings.tokenizer, **settings.special_tokens)
    dtypes = {"dtype": _dtype(config, "dtype"), "param_dtype": _dtype(config, "param_dtype")}

    decoder = _decoder(config.decoder, tokenizer.vocab_size, dtypes)
    num_images = source.num_images if settings.frames is None else 1
    if num_images is None:
        raise ConfigError(
            "config.data.num_images: None is for samples that are clips of any length; set config.processor.frames to "
            "the frames that stand for one, or num_images to the pictures that every sample has"
        )
    vision = solve_vision(config, settings, source.channels, num_images, decoder, dtypes)
    parts = {"encoder": vision.encoder, "decoder": decoder}
    for part, fields in ({} if vision.reducer is None else vision.reducer.required_fields()).items():
        parts[part] = _set(parts[part], fields, config, part)
    by_layer = _tokens_by_layer(vision, parts["decoder"])

    visual = num_images * vision.num_tokens
    processor = VqaProcessor(
        tokenizer=tokenizer,
        views=vision.views,
        num_visual_tokens=vision.num_tokens,
        num_images=num_images,
        num_frames=settings.frames,
        independent_turns=settings.independent_turns,
        max_length=visual + settings.max_text_length,
        max_prompt_length=visual + settings.max_question_length,
        max_answer_length=settings.max_answer_length,
    )
    return System(
        model=VLM(parts["encoder"], vision.connector, parts["decoder"], vision.reducer),
        cell_reader=_cell_reader(config, vision, source),
        processor=processor,
        source=source,
        grid=vision.grid,
        num_visual_tokens=by_layer[-1],
        mean_visual_tokens=sum(by_layer) / len(by_layer),
    )


def _decoder(section: Any, num_tokens: int, dtypes: dict[str, Any]) -> Any:
    """The decoder, whose vocabulary is the tokenizer's, or the larger one that the section states."""
    if "vocab_size" not in section:
        return parse_kind(DECODERS, section, "config.decoder", vocab_size=num_tokens, **dtypes)
    decoder = parse_kind(DECODERS, section, "config.decoder", **dtypes)
    if decoder.vocab_size < num_tokens:
        raise ConfigError(
            f"config.decoder.vocab_size: {decoder.vocab_size} is less than the {num_tokens} tokens of "
            "config.processor.tokenizer; take that of the release, or raise it"
        )
    return decoder


def _set(part: Any, fields: dict[str, Any], config: Any, name: str) -> Any:
    """The part with what a reducer asks of it; its parameters stay."""
    if missing := [field for field in fields if not hasattr(part, field)]:
        raise ConfigError(
            f"config.reducer.kind: {config.reducer.kind} works inside the {name}, and "
            f"{config[name].kind} has no way to do so (no field {', '.join(missing)}); take another "
            f"config.{name}.kind, such as {'vit' if name == 'encoder' else 'transformer'}, or another reducer"
        )
    return part.clone(**fields)


def _tokens_by_layer(vision: Vision, decoder: Any) -> list[int]:
    """Visual tokens of one image in every layer of the decoder."""
    counts = [vision.num_tokens] * decoder.depth
    for drop in getattr(decoder, "drops", ()):
        counts[drop.layer :] = [vision.num_views * drop.num_kept] * (decoder.depth - drop.layer)
    if counts[-1] != vision.num_left:
        raise InfeasibleBudget(f"a budget of {vision.num_left} tokens was solved, but {counts[-1]} are left at the end")
    return counts


def _cell_reader(config: Any, vision: Vision, source: Settings) -> CellReader | None:
    wanting = [label for label in config.schedule if config.stages.get(label, {}).get("objective") == "read_cells"]
    if not wanting:
        return None
    if source.cells is None:
        raise ConfigError(f"config.stages.{wanting[0]}.objective: config.data.kind {config.data.kind} has no cells")
    if vision.grid is None:
        raise ConfigError(
            f"config.stages.{wanting[0]}.objective: cells are read from a grid, and config.encoder.kind "
            f"{config.encoder.kind} packs images into a sequence; leave the stage out"
        )
    if any(side % cells for side, cells in zip(vision.grid, source.cells, strict=True)):
        raise ConfigError(
            f"config.stages.{wanting[0]}.objective: {source.cells} cells do not divide the encoder's {vision.grid} "
            "patches; change config.encoder.patch_size"
        )
    return CellReader(vision.encoder, source.cells, source.num_classes)


def _dtype(config: Any, key: str) -> Any:
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return choose(known, config[key], f"config.{key}")
