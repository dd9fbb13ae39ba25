"""The one place where a config becomes modules, a processor, a data source and a token count.

Derived values are computed here and nowhere else: the encoder's grid from the image's size, the
connector's own fields from the token budget, widths and vocabulary from each other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build.settings import EvaluationSettings, ProcessorSettings, RowSettings
from vlm_jax.build.vision import Vision, solve_vision
from vlm_jax.config import ConfigError, check_keys, choose, parse, parse_kind
from vlm_jax.data import SOURCES
from vlm_jax.data.source import Settings, Source, Tools
from vlm_jax.decoders import DECODERS
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.configured import configured
from vlm_jax.pretrained.loader import open_system
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.image import open_image, to_picture
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.plain_prompt import PlainPrompt
from vlm_jax.processors.processor import Example, Processor
from vlm_jax.processors.reduction import Reduction
from vlm_jax.processors.video import uniform_frames
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.sharding.rules import shardings, use_mesh
from vlm_jax.system import Budget, System
from vlm_jax.types import Batch, Message, RowShape, Sample

# Every key of a run's config; the last ones are read by the trainer and the evaluation.
KEYS = ("seed", "release", "dtype", "param_dtype", "token_budget", "token_budget_per", "data", "row", "processor",
        "encoder", "reducer", "connector", "decoder", "schedule", "stages", "optimizer", "loop", "mesh",
        "evaluation")  # fmt: skip
PARTS = ("encoder", "connector", "decoder")
CELL_HEAD = "cell_head"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config describes; nothing in it has parameters yet.

    Attributes:
      system: the model with its processor.
      source: where samples come from; `open_source` reads it.
      row: shape of a training row.
      prompt: shape of a prompt of the evaluation; None for that of the longest of its batch.
      text_row: shape of a training row of the stream `text_pages`, which has no pictures.
      num_frames: None, or how many of a sample's pictures stand for the clip that they are.
      cell_reader: the encoder under a dense head, where a stage's objective is `read_cells`.
    """

    system: System
    source: Settings
    row: RowShape
    prompt: RowShape | None
    text_row: RowShape
    num_frames: int | None = None
    cell_reader: CellReader | None = None

    def open_source(self) -> Source:
        """Reads the data; pictures go through the processor, boxes are spelled in Qwen-VL's way."""
        return self.source.open(Tools(format_box, open_image, self.prepare_image))

    def prepare_image(
        self, image: UInt8[np.ndarray, "height width given"]
    ) -> Float[np.ndarray, "new_height new_width channels"]:
        """The pixels of a picture's first view, as the encoder gets them.

        Raises:
          ValueError: the encoder takes packed patches.
        """
        processor = self.system.processor
        mode = "L" if processor.views.channels == 1 else "RGB"
        pixels = processor.views.images([to_picture(image, mode=mode)])[0].pixels
        if pixels.ndim != 4:
            raise ValueError("this encoder reads packed patches of several images, not one image of one size")
        return pixels[0]

    def example(self, sample: Sample, *, targets: bool) -> Example:
        """A sample through the processor: whole with `targets`, else as the prompt before its last answer.

        Raises:
          As `Processor.example`, naming the sample.
        """
        messages, images = sample.messages if targets else sample.messages[:-1], list(sample.images)
        if self.num_frames is None:
            return self.system.processor.example(messages, images, targets=targets, name=sample.sample_id)
        if not images:
            raise PictureMismatch(f"{sample.sample_id}: expected the frames of a clip, got no picture")
        chosen = uniform_frames(len(images), self.num_frames)
        clip = [[images[index] for index in chosen]]
        return self.system.processor.example(_as_clip(messages), (), clip, targets=targets, name=sample.sample_id)

    def training_row(self, sample: Sample) -> Batch:
        """A sample as a training row, a batch of one."""
        return self.system.processor.rows([[self.example(sample, targets=True)]], self.row, targets=True)

    def text_page(self, sample: Sample) -> Batch:
        """The same of the stream `text_pages`."""
        return self.system.processor.rows([[self.example(sample, targets=True)]], self.text_row, targets=True)

    @property
    def budget(self) -> Budget:
        """Visual tokens of an image."""
        assert self.system.budget is not None
        return self.system.budget

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Boxed parameters {part: tree} of the model and of the head for cells, all drawn."""
        return self.system.init(key) | self._cell_head(key)

    def boxed_shapes(self) -> dict[str, Any]:
        """Shapes of what `init` gives."""
        return self.system.boxed_shapes() | jax.eval_shape(self._cell_head, jax.random.key(0))

    def initial(self, key: jax.Array, mesh: Mesh, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """Parameters on their devices; see `System.initial`."""
        params = self.system.initial(key, mesh, without=without)
        if self.cell_reader is None or CELL_HEAD in without:
            return params
        out = shardings(jax.eval_shape(self._cell_head, key), mesh)
        with use_mesh(mesh):
            return params | jax.jit(lambda key: nn.meta.unbox(self._cell_head(key)), out_shardings=out)(key)

    def _cell_head(self, key: jax.Array) -> dict[str, Any]:
        if self.cell_reader is None:
            return {}
        images: Any = self.system.example(self.row).images
        head = self.cell_reader.init(key, jnp.zeros(images.shape[:1] + images.shape[2:], images.dtype))["params"]
        return {CELL_HEAD: {name: tree for name, tree in head.items() if name != "encoder"}}

    def num_params(self) -> dict[str, int]:
        """Parameters of each part of the model, counted by shape."""
        shapes = nn.meta.unbox(self.boxed_shapes())
        return {part: sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) for part in PARTS if part in shapes}


def _as_clip(messages: Sequence[Message]) -> list[Message]:
    """Messages with one video in place of their pictures."""
    found, clip = [], [{"type": "video"}]
    for message in messages:
        if not isinstance(message["content"], str):
            items = [item for item in message["content"] if item["type"] != "image"]
            if len(items) < len(message["content"]):
                items, clip = clip + items, []
            message = {**message, "content": items}
        found.append(message)
    return found


def build(config: Any) -> Experiment:
    """Makes what a run's config describes.

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
    if config.release is not None:
        return _of_release(config)
    settings = parse(ProcessorSettings, config.processor, "config.processor")
    row = parse(RowSettings, config.row, "config.row")
    evaluation = parse(EvaluationSettings, config.evaluation, "config.evaluation")
    if row.images is not None:
        raise ConfigError("config.row.images: samples of a config have as many pictures each; set it to None")
    if evaluation.question_length is None:
        raise ConfigError("config.evaluation.question_length: expected the text positions of a prompt, got None")
    source = parse_kind(SOURCES, config.data, "config.data")
    tokenizer = settings.read_tokenizer()
    dtypes = {"dtype": _dtype(config, "dtype"), "param_dtype": _dtype(config, "param_dtype")}

    decoder = _decoder(config.decoder, tokenizer.vocab_size, dtypes)
    num_images = source.num_images if settings.frames is None else 1
    if num_images is None:
        raise ConfigError(
            "config.data.num_images: None is for samples that are clips of any length; set config.processor.frames to "
            "the frames that stand for one, or num_images to the pictures that every sample has"
        )
    vision = solve_vision(config, settings, source.channels, decoder, dtypes)
    parts = {"encoder": vision.encoder, "decoder": decoder}
    for part, fields in ({} if vision.reducer is None else vision.reducer.required_fields()).items():
        parts[part] = _set(parts[part], fields, config, part)
    by_layer = _tokens_by_layer(vision, parts["decoder"])
    visual, images = num_images * vision.num_tokens, num_images * vision.load
    drops, count = parts["decoder"].drops, vision.num_tokens // vision.num_views

    def shaped(length: int) -> RowShape:
        """Rows of samples that all have as many pictures: each drop takes as much of all."""
        return RowShape(length, images, tuple(length - images * (count - drop.num_left(count)) for drop in drops))

    shape = shaped(row.positions(visual))
    prompt = PlainPrompt(tokenizer, settings.independent_turns)
    reduction = Reduction(vision.views, None, tuple(drop.num_left for drop in drops)) if drops else None
    processor = Processor(prompt, vision.views, tokenizer, tokenizer.pad_id or 0, reduction=reduction)
    system = System(
        model=VLM(parts["encoder"], vision.connector, parts["decoder"], vision.reducer),
        inputs=(processor.example_row(shape),),
        make_processor=lambda: processor,
        make_ends=lambda: () if tokenizer.eos_id is None else (tokenizer.eos_id,),
        budget=Budget(vision.num_tokens, tuple(by_layer), vision.grid),
    )
    return Experiment(
        system=system,
        source=source,
        row=shape,
        prompt=shaped(evaluation.question_length + visual),
        text_row=RowShape(row.positions(0) + source.context_length, 0),
        num_frames=settings.frames if num_images else None,
        cell_reader=_cell_reader(config, vision, source),
    )


def _of_release(config: Any) -> Experiment:
    """What `config.release` is made of; the sections of parts replace what they name."""
    if config.token_budget_per != "image":
        raise ConfigError("config.token_budget_per: of a release a budget is per picture, or per tile; set it to image")
    row = parse(RowSettings, config.row, "config.row")
    if row.length is None or row.images is None:
        raise ConfigError("config.row: a release needs length (positions) and images (tiles, or places of patches)")
    if parse(EvaluationSettings, config.evaluation, "config.evaluation").question_length is not None:
        raise ConfigError("config.evaluation.question_length: prompts of a release have any length; set it to None")
    source = parse_kind(SOURCES, config.data, "config.data")
    system = open_system(config.release, FAMILIES, dtype=config.dtype, param_dtype=config.param_dtype)
    system = configured(system, config.to_dict())
    processor = system.processor
    if processor.reduction is not None and isinstance(processor.views, NativeViews):
        raise ConfigError(
            f"config.reducer.kind: {config.reducer.kind} acts on pictures of any number and size in a row here, which "
            "training rows of one shape do not lay out yet; train without it, and set it when answering"
        )
    if source.channels != processor.views.channels:
        raise ConfigError(f"config.data.channels: the release reads {processor.views.channels}, set it to that")
    return Experiment(system, source, RowShape(row.length, row.images), None, RowShape(row.length, 0))


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
