"""Builds two-tower models and classifiers, from the sections of a config or from a release.

| section | two towers | classifier |
|---|---|---|
| `encoder` | the image tower, with its `pooling` | the same |
| `connector` | kind `similarity`: scale and bias of the similarities | empty |
| `decoder` | kind `text_tower`: the text tower | kind `class_head`: the names of the classes |
| `row` | `text_length`: tokens of every caption | empty |

With `config.release`, `encoder` and `decoder` replace settings of the release, and a `class_head` its own head.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8

from vlm_jax.adapter import NO_LORA, LoraSettings
from vlm_jax.build.parameters import WithParameters, shapes_of
from vlm_jax.build.settings import ImageTextSettings, PixelSettings
from vlm_jax.build.vision import build_encoder
from vlm_jax.config import ConfigError, RunConfig, check_fields, check_keys, parse, parse_kind
from vlm_jax.data.source import Settings, Source, Tools
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.optim.patterns import StageRates
from vlm_jax.pretrained.configured import ClassHead
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.image_text import labels
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.image import image_size, open_image
from vlm_jax.processors.image_text import ImageTextProcessor, SquareInputs, TextInputs
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.ranges import Finite, Positive, Size
from vlm_jax.system import System
from vlm_jax.types import Fields, ImageTextBatch, Sample, VideoSize

CAPTIONS = "captions"  # the stream of images with captions


@dataclasses.dataclass(frozen=True)
class Similarity:
    """`config.connector` of two towers.

    Attributes:
      scale: initial factor of the cosine similarities, which is learned as a logarithm; 10 in SigLIP, 1 / 0.07 in CLIP.
      bias: initial number added to them; -10 in SigLIP; None for a model without one, as in CLIP.
    """

    scale: Positive
    bias: Finite | None = None

    def __post_init__(self):
        check_fields(self, "config.connector.")


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """`config.row` of two towers.

    Attributes:
      text_length: tokens of every caption, with its end token; shorter ones are padded, longer ones truncated.
    """

    text_length: Size

    def __post_init__(self):
        check_fields(self, "config.row.")


@dataclasses.dataclass(frozen=True)
class _Empty:
    """A section without keys."""


@dataclasses.dataclass(frozen=True)
class ImageTextExperiment(WithParameters):
    """A two-tower model or a classifier with its data, without parameters.

    Attributes:
      system: the model with its processor.
      source: settings of the data source; `open_source` opens it.
      labels: names of a classifier's classes; empty for two towers.
      learning_rates: by pattern, of every stage, by the config path of the stage.
      lora: adapters of the model's linear layers, which are the part `lora` of its parameters.
    """

    system: System
    source: Settings
    labels: tuple[str, ...] = ()
    learning_rates: StageRates = ()
    lora: LoraSettings = NO_LORA

    @property
    def processor(self) -> ImageTextProcessor:
        """The processor of images and captions."""
        processor = self.system.any_processor
        assert isinstance(processor, ImageTextProcessor)
        return processor

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model."""
        return tuple(self.system.boxed_shapes())

    def open_source(self) -> Source:
        """Reads the data."""
        return self.source.open(Tools(format_box, open_image, image_size, self.prepare_image, _no_video))

    def prepare_image(
        self, image: UInt8[np.ndarray, "height width given"]
    ) -> Float[np.ndarray, "new_height new_width channels"]:
        """The preprocessed pixels of an image.

        Raises:
          ValueError: the encoder takes packed patches.
        """
        pixels = self.processor([image]).images
        if not isinstance(pixels, np.ndarray):
            raise ValueError("this encoder takes packed patches of an image, not one image of one size")
        return pixels[0]

    def captioned(self, samples: Sequence[Sample]) -> ImageTextBatch:
        """The images of samples and their captions.

        Raises:
          PictureMismatch: a sample without exactly one image, or with a video.
        """
        return self.processor(images_of(samples), [sample.answer for sample in samples])

    def labelled(self, samples: Sequence[Sample]) -> ImageTextBatch:
        """The images of samples and the classes that their captions name.

        Raises:
          PictureMismatch: as of `captioned`, or a caption that names no class.
        """
        images = self.processor(images_of(samples)).images
        classes = [label_of(sample.sample_id, sample.answer, self.labels) for sample in samples]
        return ImageTextBatch(images, labels=np.asarray(classes, np.int32))

    def num_params(self) -> dict[str, int]:
        """Parameters of each part, counted by shape."""
        shapes = nn.meta.unbox(self.boxed_shapes())
        return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}


def images_of(samples: Sequence[Sample]) -> list[np.ndarray]:
    """The image of each sample.

    Raises:
      PictureMismatch: a sample without exactly one image, or with a video.
    """
    for sample in samples:
        if len(sample.images) != 1 or sample.videos:
            raise PictureMismatch(
                f"{sample.sample_id}: expected one image and its caption, got {len(sample.images)} images and "
                f"{len(sample.videos)} videos"
            )
    return [sample.images[0] for sample in samples]


def label_of(sample_id: str, caption: str, names: Sequence[str]) -> int:
    """The index of the class that a sample's caption names.

    Raises:
      PictureMismatch: it names none.
    """
    caption = caption.strip()
    if caption not in names:
        raise PictureMismatch(
            f"{sample_id}: the caption {caption!r} is none of the {len(names)} classes {', '.join(names[:20])}"
        )
    return names.index(caption)


def _no_video(*_: Any, **__: Any) -> VideoSize:
    raise ValueError("this model takes no videos")


def two_tower_system(config: RunConfig, channels: int, dtypes: Fields) -> tuple[System, tuple[str, ...]]:
    """A two-tower model of the sections; see the module."""
    settings = parse(ImageTextSettings, config.processor, "config.processor")
    length = parse(CaptionSettings, config.row, "config.row").text_length
    similarity = parse_kind({"similarity": Similarity}, config.connector, "config.connector")
    tokenizer = settings.read_tokenizer()
    derived = {"vocab_size": tokenizer.vocab_size, "context_length": length, **dtypes}
    if config.decoder.get("pooling") == "end":
        derived["end_token"] = tokenizer.eos_id
    text = parse_kind({"text_tower": TextTower}, config.decoder, "config.decoder", **derived)
    size, views = _views(settings, channels)
    image = build_encoder(config.encoder, "config.encoder", size, dtypes)
    model = TwoTower(image, text, math.log(similarity.scale), similarity.bias)
    texts = TextInputs(tokenizer, length, tokenizer.pad_id or 0, end_id=tokenizer.eos_id)
    inputs = (
        jax.ShapeDtypeStruct((1, *size, channels), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    system = _system(model, inputs, ImageTextProcessor(SquareInputs(views), texts, channels=channels))
    shapes_of(system)  # towers without pooling, or of different widths
    return system, ()


def classifier_system(config: RunConfig, channels: int, dtypes: Fields) -> tuple[System, tuple[str, ...]]:
    """A classifier of the sections; see the module."""
    settings = parse(PixelSettings, config.processor, "config.processor")
    for key in ("row", "connector"):
        parse(_Empty, config[key], f"config.{key}")
    names = parse_kind({"class_head": ClassHead}, config.decoder, "config.decoder").names
    size, views = _views(settings, channels)
    encoder = build_encoder(config.encoder, "config.encoder", size, dtypes)
    if not isinstance(encoder, ViT) or encoder.pooling == "none":
        raise ConfigError("config.encoder: a classifier needs the kind vit, with a pooling such as gap or map")
    inputs = (jax.ShapeDtypeStruct((1, *size, channels), jnp.float32),)
    processor = ImageTextProcessor(SquareInputs(views), channels=channels)
    return _system(Classifier(encoder, len(names)), inputs, processor), names


# Kind of `config.decoder` of models without conversations -> what builds them.
IMAGE_TEXT = {"text_tower": two_tower_system, "class_head": classifier_system}


def image_text_experiment(
    config: RunConfig, source: Settings, learning_rates: StageRates, dtypes: Fields
) -> ImageTextExperiment:
    """The experiment of a config whose `decoder` is of a kind of `IMAGE_TEXT`.

    Raises:
      ConfigError: an unknown, unused, missing or ill-typed key, or sizes that do not fit.
    """
    _check_unused(config)
    system, names = IMAGE_TEXT[config.decoder.kind](config, source.channels, dtypes)
    return ImageTextExperiment(system, source, names, learning_rates, parse(LoraSettings, config.lora, "config.lora"))


def released_image_text(
    config: RunConfig, system: System, source: Settings, learning_rates: StageRates
) -> ImageTextExperiment:
    """The experiment of a released two-tower model or classifier, with the sections of the config applied.

    Raises:
      ConfigError: a section that such a release does not have, or data of other channels.
    """
    parse(_Empty, config.row, "config.row")
    lora = parse(LoraSettings, config.lora, "config.lora")
    experiment = ImageTextExperiment(system, source, learning_rates=learning_rates, lora=lora)
    if source.channels != experiment.processor.channels:
        raise ConfigError(f"config.data.channels: expected {experiment.processor.channels}, as in the release")
    if not isinstance(system.model, Classifier):
        return experiment
    if "kind" in config.decoder:
        return dataclasses.replace(experiment, labels=tuple(config.decoder.names))
    assert system.release is not None
    try:
        return dataclasses.replace(experiment, labels=labels(system.release.config))
    except PretrainedError as error:
        raise ConfigError(f"config.decoder: {error}; name the classes with the kind class_head") from error


def _check_unused(config: RunConfig) -> None:
    """Refuses settings of visual tokens, which no decoder reads here."""
    if config.token_budget is not None:
        raise ConfigError("config.token_budget: this model has no visual tokens to count; set it to None")
    if config.token_budget_per != "image":
        raise ConfigError("config.token_budget_per: this model has no visual tokens to count; set it to image")
    section: Mapping[str, Any] = config.reducer
    check_keys(section, ("kind",), "config.reducer")
    if section.get("kind", "none") != "none":
        raise ConfigError("config.reducer.kind: this model has no visual tokens to reduce; set it to none")


def _views(settings: PixelSettings, channels: int) -> tuple[tuple[int, int], SquareViews]:
    if settings.image_size is None:
        raise ConfigError("config.processor.image_size: expected (height, width) in pixels, got None")
    return settings.image_size, SquareViews(settings.pixels(channels), settings.image_size)


def _system(model: nn.Module, inputs: tuple[Any, ...], processor: ImageTextProcessor) -> System:
    return System(model, inputs, functools.partial(_same, processor), functools.partial(_same, ()))


def _same(value: Any) -> Any:
    return value
