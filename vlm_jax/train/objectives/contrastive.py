"""Losses over the pairs of a batch of images and captions: CLIP's softmax, SigLIP's sigmoid, and distillation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlm_jax.build import AnyExperiment, ImageTextExperiment, build
from vlm_jax.build.image_text import CAPTIONS
from vlm_jax.checkpoints.orbax import CHECKPOINTS
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.config import ConfigError, check_fields, did_you_mean, read_json
from vlm_jax.losses.exchange import EXCHANGES, distributed
from vlm_jax.losses.pairwise import DEFAULT_BLOCK_SIZE
from vlm_jax.losses.two_tower import LOSSES, distillation_loss, locked_image, sigmoid_loss, softmax_loss
from vlm_jax.models.two_tower import Embeddings, TwoTower
from vlm_jax.paths import absolute
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import is_run, open_system
from vlm_jax.processors.image_text import ImageTextProcessor
from vlm_jax.ranges import NonNegative, Positive, Size
from vlm_jax.sharding.rules import BATCH_AXES, placed
from vlm_jax.system import System
from vlm_jax.train.objectives.objective import Loss, Metrics, Objective
from vlm_jax.train.workdir import CONFIG_FILE, INIT_FROM
from vlm_jax.types import DistilledBatch, ImageTextBatch, Params, Sample, Tree

CLIP_MAX_SCALE = 100.0
ONE_DEVICE = {"softmax": softmax_loss, "sigmoid": sigmoid_loss, "distillation": distillation_loss}


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Trains two towers on images with captions, over all pairs of the whole batch.

    A stage that gives the image tower no learning rate is locked-image tuning (LiT).

    Attributes:
      loss: `softmax` (CLIP), `sigmoid` (SigLIP), or `distillation`: softmax, and the cross entropy with the softmax of
        a teacher.
      exchange: how devices see the captions of the others, one of `losses.exchange.EXCHANGES`.
      block_size: images whose logits are held at once.
      teacher: with `distillation`: a released two-tower model, or the workdir of a run of one. It is frozen.
      distillation_weight: weight of the cross entropy with the teacher.
      max_scale: a step leaves the scale of the similarities at most this large, also where it began above; None for
        CLIP's 100 with softmax, and for no limit with sigmoid.

    Source: Radford et al. 2021 (CLIP), sections 2.3 and 2.5; Zhai et al. 2023 (SigLIP), section 3; open_clip's
    `DistillClipLoss`; Zhai et al. 2022 (LiT), section 3.
    """

    loss: str
    exchange: str = "ring"
    block_size: Size = DEFAULT_BLOCK_SIZE
    teacher: str | None = None
    distillation_weight: NonNegative = 1.0
    max_scale: Positive | None = None

    streams: ClassVar[tuple[str, ...]] = (CAPTIONS,)

    def __post_init__(self):
        check_fields(self, "")
        for key, known in (("loss", LOSSES), ("exchange", EXCHANGES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}: no '{getattr(self, key)}'{did_you_mean(getattr(self, key), known)}")
        if (self.teacher is None) != (self.loss != "distillation"):
            raise ValueError("teacher: the loss distillation has one, and no other; set or remove it")

    @property
    def limits(self) -> Mapping[str, float]:
        """As `Objective.limits`: of the scale, which is stored as a logarithm."""
        scale = CLIP_MAX_SCALE if self.max_scale is None and self.loss != "sigmoid" else self.max_scale
        return {} if scale is None else {"log_scale": math.log(scale)}

    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Requires two towers, and the whole batch at once."""
        if not isinstance(experiment.system.model, TwoTower):
            raise ConfigError(
                f"{path}.objective: contrastive trains two towers, and this is a "
                f"{type(experiment.system.model).__name__}; set config.decoder.kind to text_tower"
            )
        if accumulate > 1:
            raise ConfigError(
                f"{path}.accumulate: the loss of contrastive is over all pairs of the batch, which microbatches do not "
                "see; set it to 1"
            )
        if self.teacher is not None:
            open_teacher(self.teacher, path)

    def build(self, experiment: AnyExperiment, trained: Collection[str] = ("image",)) -> Loss:
        """See the class."""
        model = experiment.system.model
        assert isinstance(model, TwoTower)
        teacher = None if self.teacher is None else open_teacher(self.teacher).model
        return _contrastive(cast(Any, model), teacher, self, "image" not in trained)

    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """An image with its caption, and the same for the teacher."""
        del stream
        assert isinstance(experiment, ImageTextExperiment)
        if self.teacher is None:
            return functools.partial(_captioned, experiment)
        processor = open_teacher(self.teacher).any_processor
        assert isinstance(processor, ImageTextProcessor)
        return functools.partial(_for_both, experiment, processor)

    def example(self, experiment: AnyExperiment, stream: str) -> Tree:
        """An image with its caption; raises a ConfigError with a teacher, whose images have other sizes."""
        if self.teacher is not None:
            return super().example(experiment, stream)
        assert isinstance(experiment, ImageTextExperiment)
        return ImageTextBatch(*experiment.system.inputs)

    def reference_shapes(self, trained: Params) -> Params | None:
        """The teacher's parameters."""
        return None if self.teacher is None else open_teacher(self.teacher).boxed_shapes()

    def reference(self, trained: Params, mesh: Mesh) -> Params | None:
        """The teacher's parameters, from its release or the newest checkpoint of its run."""
        if self.teacher is None:
            return None
        system = open_teacher(self.teacher)
        if system.release is not None and not is_run(self.teacher):
            return system.initial(jax.random.key(0), mesh)
        return read_parts(epath.Path(absolute(self.teacher)) / CHECKPOINTS, placed(system.boxed_shapes(), mesh))


def _captioned(experiment: ImageTextExperiment, sample: Sample) -> ImageTextBatch:
    return experiment.captioned([sample])


def _for_both(experiment: ImageTextExperiment, teacher: ImageTextProcessor, sample: Sample) -> DistilledBatch:
    return DistilledBatch(experiment.captioned([sample]), teacher(list(sample.images), [sample.answer]))


@functools.lru_cache(maxsize=4)
def open_teacher(teacher: str, path: str = "config.stages") -> System:
    """The two-tower system of a release or of a run's workdir, without parameters.

    Raises:
      ConfigError: it is not a two-tower model.
      PretrainedError, CheckpointFileError: it cannot be opened.
    """
    if is_run(teacher):
        config = read_json(Path(absolute(teacher)) / CONFIG_FILE, ConfigError)
        system = build(ConfigDict({key: value for key, value in config.items() if key != INIT_FROM})).system
    else:
        system = open_system(teacher, FAMILIES, dtype="float32")
    if not isinstance(system.model, TwoTower):
        raise ConfigError(f"{path}.teacher: expected two towers, got a {type(system.model).__name__} in {teacher}")
    return system


@functools.lru_cache(maxsize=64)  # equal objectives are one object, so that equal steps are compiled once
def _contrastive(model: TwoTower, teacher: nn.Module | None, settings: Contrastive, locked: bool) -> Loss:
    def embedded(module: nn.Module, params: Params, batch: ImageTextBatch) -> Embeddings:
        found = module.apply({"params": params}, *batch.inputs)
        assert isinstance(found, Embeddings)
        return found

    def loss(
        params: Params,
        batch: ImageTextBatch | DistilledBatch,
        key: jax.Array,
        weight: jax.Array | float = 1.0,
        reference: Params | None = None,
    ) -> tuple[jax.Array, Metrics]:
        del key, weight  # a step has one microbatch
        pairs = batch.student if isinstance(batch, DistilledBatch) else batch
        found = embedded(model, params, pairs)
        arguments = {"scale": found.scale, "bias": found.bias}
        if isinstance(batch, DistilledBatch):
            assert teacher is not None and reference is not None
            theirs = embedded(teacher, reference, batch.teacher)
            arguments |= {
                "teacher_image_features": theirs.image,
                "teacher_text_features": theirs.text,
                "teacher_scale": theirs.scale,
            }
        function = over_devices(settings)
        function = locked_image(function) if locked else function
        value = function(found.image, found.text, **arguments)
        metrics = {"scale": found.scale, "bias": found.bias}
        if teacher is None:
            return value, metrics
        contrastive, distilled = value
        metrics |= {"contrastive_loss": contrastive, "distillation_loss": distilled}
        return contrastive + settings.distillation_weight * distilled, metrics

    return loss


def over_devices(settings: Contrastive) -> Callable[..., Tree]:
    """The loss over the batch of all devices of the current mesh, none of which holds all logits."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape or math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 1:
        return functools.partial(ONE_DEVICE[settings.loss], block_size=settings.block_size)
    return distributed(settings.loss, mesh, BATCH_AXES, exchange=settings.exchange, block_size=settings.block_size)
