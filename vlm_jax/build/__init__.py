"""Builds modules, a processor and a data source from a config, and counts tokens.

Derived values are computed only here: the encoder's grid from the image's size, the
connector's fields from the token budget, widths and vocabulary from each other.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vlm_jax.adapter import NO_LORA, LoraSettings
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build.image_text import IMAGE_TEXT, ImageTextExperiment, image_text_experiment, released_image_text
from vlm_jax.build.parameters import WithParameters, fitting
from vlm_jax.build.sections import KEYS as KEYS
from vlm_jax.build.sections import check_model
from vlm_jax.build.settings import EvaluationSettings, ProcessorSettings, RowSettings
from vlm_jax.build.vision import Vision, solve_vision
from vlm_jax.config import ConfigError, RunConfig, choose, convert, parse, parse_kind
from vlm_jax.data import SOURCES
from vlm_jax.data.source import Settings, Source, Tools
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.decoders import DECODERS
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.optim.patterns import StageRates
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.configured import configured
from vlm_jax.pretrained.loader import open_system
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.image import image_size, open_image, to_picture
from vlm_jax.processors.learned import AS_RELEASED
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.plain_prompt import PlainPrompt
from vlm_jax.processors.processor import Example, Processor
from vlm_jax.processors.reduction import Reduction
from vlm_jax.processors.video import uniform_frames, video_size
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.sharding.initial import Init, boxed_shapes, draw, in_float32, init_of
from vlm_jax.system import Budget, System
from vlm_jax.types import Batch, Dtype, Fields, Load, Message, Params, RowShape, Sample, SampleSizes, VideoSize

Part = TypeVar("Part", Encoder, Decoder)

PARTS = ("encoder", "connector", "decoder")
CELL_HEAD = "cell_head"


@dataclasses.dataclass(frozen=True)
class Experiment(WithParameters):
    """Everything that a config describes, without parameters.

    Attributes:
      system: the model with its processor.
      source: settings of the data source; `open_source` opens it.
      row: shape of a training row.
      prompt: shape of a prompt of the evaluation; None for that of the longest of its batch.
      text_rows: shape of a training row of each stream without pictures.
      rows: how samples share rows of these shapes.
      num_frames: None, or how many of a sample's pictures stand for the clip that they are.
      cell_reader: the encoder under a dense head, where a stage's objective is `read_cells`.
      learning_rates: by pattern, of every stage, by the config path of the stage.
      lora: adapters of the model's linear layers, which are the part `lora` of its parameters.
    """

    system: System
    source: Settings
    row: RowShape
    prompt: RowShape | None
    text_rows: dict[str, RowShape]
    rows: RowSettings
    num_frames: int | None = None
    cell_reader: CellReader | None = None
    learning_rates: StageRates = ()
    lora: LoraSettings = NO_LORA

    def open_source(self) -> Source:
        """Reads the data; pictures go through the processor, boxes are spelled in Qwen-VL's way."""
        processor = self.system.processor
        measured = functools.partial(video_size, sampling=processor.frame_sampler)
        return self.source.open(
            Tools(format_box, open_image, image_size, self.prepare_image, measured, processor.placeholders)
        )

    def prepare_image(
        self, image: UInt8[np.ndarray, "height width given"]
    ) -> Float[np.ndarray, "new_height new_width channels"]:
        """The preprocessed pixels of an image's first view.

        Raises:
          ValueError: the encoder takes packed patches.
        """
        processor = self.system.processor
        mode = "L" if processor.views.channels == 1 else "RGB"
        pixels = processor.views.images([to_picture(image, mode=mode)])[0].pixels
        if pixels.ndim != 4:
            raise ValueError("this encoder takes packed patches of several images, not one image of one size")
        return pixels[0]

    def example(self, sample: Sample, *, targets: bool) -> Example:
        """Processes a sample: the whole with `targets`, else the prompt before its last answer.

        Raises:
          As `Processor.example`, naming the sample.
        """
        messages, images = sample.messages if targets else sample.messages[:-1], list(sample.images)
        name, learned = sample.sample_id, self._learned if targets else {}
        if self.num_frames is None:
            videos = list(sample.videos)
            return self.system.processor.example(messages, images, videos, name=name, **learned)
        if not images:
            raise PictureMismatch(f"{name}: expected the frames of a clip, got no image")
        chosen = uniform_frames(len(images), self.num_frames)
        clip = [[images[index] for index in chosen]]
        return self.system.processor.example(_as_clip(messages), (), clip, name=name, **learned)

    def measure(self, sample: SampleSizes) -> Load:
        """What a sample takes of a training row.

        Raises:
          As `Processor.measure`, naming the sample.
        """
        messages, sizes, clips = sample.messages, list(sample.sizes), list(sample.videos)
        if self.num_frames is not None:
            if not sizes:
                raise PictureMismatch(f"{sample.sample_id}: expected the frames of a clip, got no picture")
            chosen = uniform_frames(len(sizes), self.num_frames)
            messages, clips, sizes = _as_clip(messages), [VideoSize(len(chosen), *sizes[chosen[0]])], []
        return self.system.processor.measure(messages, sizes, clips, name=sample.sample_id, **self._learned)

    @property
    def _learned(self) -> Fields:
        """Arguments of the processor for training."""
        return {"targets": AS_RELEASED if self.rows.as_released else True, "turns": self.rows.turns}

    def training_row(self, *samples: Sample, shape: RowShape | None = None) -> Batch:
        """Samples that share a training row, of the shape `row` unless another is given, as a batch of one.

        Raises:
          MalformedRecords: a sample is a pair of answers.
        """
        if pairs := [sample.sample_id for sample in samples if sample.rejected]:
            raise MalformedRecords(f"{pairs[0]}: has a 'rejected' answer, which only the objective prefer learns from")
        row = [self.example(sample, targets=True) for sample in samples]
        return self.system.processor.rows([row], shape or self.row, targets=True, keys=self.rows.keys)

    def preference_rows(self, sample: Sample) -> Batch:
        """A row of a sample's preferred conversation, and one of the rejected conversation.

        Raises:
          MalformedRecords: the sample has no rejected conversation.
        """
        if not sample.rejected:
            raise MalformedRecords(
                f"{sample.sample_id}: expected a pair of answers, 'chosen' and 'rejected', for the objective prefer"
            )
        pair = (sample, dataclasses.replace(sample, messages=sample.rejected))
        rows = [[self.example(one, targets=True)] for one in pair]
        return self.system.processor.rows(rows, self.row, targets=True, keys=self.rows.keys)

    @property
    def budget(self) -> Budget:
        """Visual tokens of an image."""
        assert self.system.budget is not None
        return self.system.budget

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model, without the head for cells."""
        return PARTS

    @property
    def drawn_shapes(self) -> Params:
        """Also of the head for cells."""
        shapes, init = super().drawn_shapes, self._cell_init
        return shapes if init is None else shapes | _cell_head(boxed_shapes(init))

    def initial(self, key: jax.Array, mesh: Mesh, *, without: Sequence[str] = ()) -> Params:
        """Parameters on their devices; see `System.initial`."""
        params, init = super().initial(key, mesh, without=without), self._cell_init
        if init is None or CELL_HEAD in without:
            return params
        head = [name for name in boxed_shapes(init) if name != "encoder"]
        return params | in_float32(_cell_head(draw(init, key, head, mesh)), self.trained)

    @property
    def _cell_init(self) -> Init | None:
        if self.cell_reader is None:
            return None
        images = self.system.example(self.row).images
        assert isinstance(images, jax.ShapeDtypeStruct)  # cells are read from images of one size
        shape = images.shape[:1] + images.shape[2:]
        return init_of(self.cell_reader, (jax.ShapeDtypeStruct(shape, images.dtype),))

    def num_params(self) -> dict[str, int]:
        """Parameters of each part of the model, counted by shape."""
        shapes = nn.meta.unbox(self.boxed_shapes())
        return {part: sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) for part in PARTS if part in shapes}


AnyExperiment = Experiment | ImageTextExperiment  # a config describes one of them


def _cell_head(reader: Params) -> Params:
    """The parameters of a `CellReader` but those of its encoder, as a part of an experiment."""
    return {CELL_HEAD: {name: tree for name, tree in reader.items() if name != "encoder"}}


def _as_clip(messages: Sequence[Message]) -> list[Message]:
    """Messages with one video in place of their images."""
    found, clip = [], [{"type": "video"}]
    for message in messages:
        if not isinstance(message["content"], str):
            items = [item for item in message["content"] if item["type"] != "image"]
            if len(items) < len(message["content"]):
                items, clip = clip + items, []
            message = {**message, "content": items}
        found.append(message)
    return found


def build(config: Any) -> AnyExperiment:
    """Builds the experiment of a run's config.

    Args:
      config: a ConfigDict with the sections of `configs/base.py`.

    Raises:
      ConfigError: an unknown, unused, missing or ill-typed key, or sizes that do not fit.
      InfeasibleBudget: the reducer or the connector cannot meet `config.token_budget`.
    """
    check_model(config)
    if config.release is not None:
        system = open_system(config.release, FAMILIES, dtype=config.dtype, param_dtype=config.param_dtype)
        return of_system(config, system)
    if config.decoder.get("kind") in IMAGE_TEXT:
        source = parse_kind(SOURCES, config.data, "config.data")
        dtypes = {"dtype": _dtype(config, "dtype"), "param_dtype": _dtype(config, "param_dtype")}
        with fitting():
            return image_text_experiment(config, source, _learning_rates(config), dtypes)
    with fitting():
        return _of_sections(config)


def _of_sections(config: RunConfig) -> Experiment:
    """The experiment of a model that answers, described by the sections alone."""
    settings = parse(ProcessorSettings, config.processor, "config.processor")
    row = parse(RowSettings, config.row, "config.row")
    evaluation = parse(EvaluationSettings, config.evaluation, "config.evaluation")
    if not row.pack and (unread := [key for key in ("images", "pictures", "kept") if getattr(row, key) is not None]):
        raise ConfigError(f"config.row.{unread[0]}: is only for a release, or with config.row.pack; set it to None")
    if evaluation.question_length is None:
        raise ConfigError("config.evaluation.question_length: expected the text positions of a prompt, got None")
    source = parse_kind(SOURCES, config.data, "config.data")
    tokenizer = settings.read_tokenizer()
    dtypes = {"dtype": _dtype(config, "dtype"), "param_dtype": _dtype(config, "param_dtype")}

    drawn = _decoder(config.decoder, tokenizer.vocab_size, dtypes)
    num_images = source.num_images if settings.frames is None else 1
    if num_images is None:
        raise ConfigError(
            "config.data.num_images: None is for samples that are clips of any length; set config.processor.frames to "
            "the number of sampled frames, or num_images to the images of every sample"
        )
    vision = solve_vision(config, settings, source.channels, drawn, dtypes)
    required = {} if vision.reducer is None else vision.reducer.required_fields()
    encoder = _set(vision.encoder, required.get("encoder", {}), config, "encoder")
    decoder = _set(drawn, required.get("decoder", {}), config, "decoder")
    by_layer = _tokens_by_layer(vision, decoder)
    visual, images = num_images * vision.num_tokens, num_images * vision.load
    drops, count = decoder.drops, vision.num_tokens // vision.num_views

    def shaped(length: int) -> RowShape:
        """The row shape of samples with equally many images: each drop takes the same number from all."""
        return RowShape(length, images, tuple(length - images * (count - drop.num_left(count)) for drop in drops))

    shape = row.shape(len(drops)) if row.pack else shaped(row.positions(visual))
    if vision.reducer is not None and vision.reducer.reduces_clips and shape.images % (settings.frames or 1):
        raise ConfigError(
            f"config.row.images: {config.reducer.kind} compares the frames of whole clips; expected a multiple of "
            f"config.processor.frames={settings.frames}, got {shape.images}"
        )
    text_rows = {}
    for stream, context in source.text_streams.items():
        length = shape.length if row.pack else row.positions(0) + context
        text_rows[stream] = RowShape(length, 0, (length,) * len(drops))
    prompt = PlainPrompt(tokenizer, settings.independent_turns)
    reduction = Reduction(vision.views, None, tuple(drop.num_left for drop in drops)) if drops else None
    processor = Processor(prompt, vision.views, tokenizer, tokenizer.pad_id or 0, reduction=reduction)
    system = System(
        model=VLM(encoder, vision.connector, decoder, vision.reducer),
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
        text_rows=text_rows,
        rows=row,
        num_frames=settings.frames if num_images else None,
        cell_reader=_cell_reader(config, vision, source),
        learning_rates=_learning_rates(config),
        lora=parse(LoraSettings, config.lora, "config.lora"),
    )


def of_system(config: Any, system: System) -> AnyExperiment:
    """The experiment of a release's system; the sections of parts replace its settings.

    Args:
      config: of a run, with `release`.
      system: of that release.

    Raises:
      ConfigError, InfeasibleBudget: as `build`.
    """
    if config.token_budget_per != "image":
        raise ConfigError("config.token_budget_per: the budget of a release is per image, or per tile; set it to image")
    source = parse_kind(SOURCES, config.data, "config.data")
    if isinstance(system.model, TwoTower | Classifier) and "length" in config.row:
        raise ConfigError(
            f"config.release: {config.release} is a {type(system.model).__name__}, which answers no questions; train "
            "it with --config=configs/finetune_towers.py"
        )
    system = configured(system, config.to_dict())
    if isinstance(system.model, TwoTower | Classifier):
        return released_image_text(config, system, source, _learning_rates(config))
    row = parse(RowSettings, config.row, "config.row")
    if parse(EvaluationSettings, config.evaluation, "config.evaluation").question_length is not None:
        raise ConfigError("config.evaluation.question_length: prompts of a release have any length; set it to None")
    processor = system.processor
    reduction = processor.reduction
    if reduction is not None and isinstance(processor.views, NativeViews) and row.pictures is None:
        raise ConfigError(
            f"config.row.pictures: {config.reducer.kind} acts on every picture of a packed row; set the most pictures "
            "that a row has"
        )
    shape = row.shape(0 if reduction is None else len(reduction.drops))
    if source.channels != processor.views.channels:
        raise ConfigError(f"config.data.channels: expected {processor.views.channels}, as in the release")
    text_rows = dict.fromkeys(source.text_streams, RowShape(shape.length, 0, (shape.length,) * len(shape.kept)))
    settings = {"learning_rates": _learning_rates(config), "lora": parse(LoraSettings, config.lora, "config.lora")}
    return Experiment(system, source, shape, None, text_rows, row, **settings)


def build_conversational(config: Any) -> Experiment:
    """`build` for a model that answers.

    Raises:
      ConfigError: also for two towers or a classifier.
    """
    experiment = build(config)
    if not isinstance(experiment, Experiment):
        name = type(experiment.system.model).__name__
        raise ConfigError(
            f"config.decoder: expected a model that answers questions, got a {name}; train it by cli.train with a "
            "config such as configs/finetune_towers.py"
        )
    return experiment


def _learning_rates(config: RunConfig) -> StageRates:
    """Those of the stages of the schedule, with their config paths; what is not a stage is refused by the trainer."""
    stages = {label: config.stages[label] for label in config.schedule if label in config.stages}
    paths = {
        label: f"config.stages.{label}.learning_rates" for label, stage in stages.items() if "learning_rates" in stage
    }
    return tuple((path, convert(stages[label].learning_rates, dict[str, float], path)) for label, path in paths.items())


def _decoder(section: Any, num_tokens: int, dtypes: Fields) -> Any:
    """The decoder, with the tokenizer's vocabulary size, or a larger one in the section."""
    if "vocab_size" not in section:
        return parse_kind(DECODERS, section, "config.decoder", vocab_size=num_tokens, **dtypes)
    decoder = parse_kind(DECODERS, section, "config.decoder", **dtypes)
    if decoder.vocab_size < num_tokens:
        raise ConfigError(
            f"config.decoder.vocab_size: {decoder.vocab_size} is less than the {num_tokens} tokens of "
            "config.processor.tokenizer; use the release's, or raise it"
        )
    return decoder


def _set(part: Part, fields: Fields, config: RunConfig, name: str) -> Part:
    """The part with the fields that a reducer needs; its parameters are unchanged."""
    if not fields:
        return part
    hints = typing.get_type_hints(type(part))
    if missing := [field for field in fields if field not in hints]:
        raise ConfigError(
            f"config.reducer.kind: {config.reducer.kind} works inside the {name}, but "
            f"{config[name].kind} does not support it (no field {', '.join(missing)}); choose another "
            f"config.{name}.kind, such as {'vit' if name == 'encoder' else 'transformer'}, or another reducer"
        )
    return part.clone(**fields)


def _tokens_by_layer(vision: Vision, decoder: Decoder) -> list[int]:
    """Visual tokens of one image in every layer of the decoder."""
    counts = [vision.num_tokens] * decoder.depth
    for drop in decoder.drops:
        counts[drop.layer :] = [vision.num_views * drop.num_kept] * (decoder.depth - drop.layer)
    if counts[-1] != vision.num_left:
        raise InfeasibleBudget(
            f"a budget of {vision.num_left} tokens was solved, but {counts[-1]} reach the last layer"
        )
    return counts


def _cell_reader(config: RunConfig, vision: Vision, source: Settings) -> CellReader | None:
    wanting = [label for label in config.schedule if config.stages.get(label, {}).get("objective") == "read_cells"]
    if not wanting:
        return None
    if source.cells is None:
        raise ConfigError(f"config.stages.{wanting[0]}.objective: config.data.kind {config.data.kind} has no cells")
    if vision.grid is None:
        raise ConfigError(
            f"config.stages.{wanting[0]}.objective: cells need a grid, but config.encoder.kind "
            f"{config.encoder.kind} packs images into a sequence; remove the stage"
        )
    if any(side % cells for side, cells in zip(vision.grid, source.cells, strict=True)):
        raise ConfigError(
            f"config.stages.{wanting[0]}.objective: {source.cells} cells do not divide the encoder's {vision.grid} "
            "patches; change config.encoder.patch_size"
        )
    return CellReader(vision.encoder, source.cells, source.num_classes)


def _dtype(config: RunConfig, key: str) -> Dtype:
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return choose(known, config[key], f"config.{key}")
