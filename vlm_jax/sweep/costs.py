"""What a point of a sweep costs, counted by shape: nothing is allocated."""

import dataclasses
import functools
from collections.abc import Hashable, Iterable
from typing import Any, cast

import jax
from flax import linen as nn

from vlm_jax.build import Experiment
from vlm_jax.config import ConfigError
from vlm_jax.costs.flops import count_flops
from vlm_jax.evals.vqa import tokens_by_span, tokens_left
from vlm_jax.models.vlm import flat_images, flat_question
from vlm_jax.system import Params
from vlm_jax.types import Batch, Sample, Tree, WholesAndTiles


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a point costs.

    Attributes:
      num_visual_tokens: tokens of one image that reach the decoder's last layers.
      mean_visual_tokens: the mean over its layers.
      num_params: parameters of each part.
      flops: of one example with its images: `encoder`, `connector` (and reducer), and `prefill`, the decoder over a
        prompt: one of full length where a config states it, else that of the sample.
    """

    num_visual_tokens: float | int
    mean_visual_tokens: float | int
    num_params: dict[str, int]
    flops: dict[str, int]


def first_with_images(samples: Iterable[Sample]) -> Sample:
    """The first sample with an image, else the first, as the one whose costs are counted.

    Raises:
      ConfigError: no sample can be read.
    """
    first = None
    for sample in samples:
        first = sample if first is None else first
        if sample.images:
            return sample
    if first is None:
        raise ConfigError("config.data.evaluation_path: expected a record whose images can be read, got none")
    return first


def costs(experiment: Experiment, sample: Sample | None = None) -> Costs:
    """The costs of a point before anything runs.

    Args:
      experiment: of the point.
      sample: whose prompt is counted; None where prompts have a fixed shape and images a fixed number of tokens.
    """
    system, shapes = experiment.system, nn.meta.unbox(experiment.system.boxed_shapes())
    if sample is None:
        assert experiment.prompt is not None
        budget = experiment.budget
        prompt = dataclasses.replace(system.example(experiment.prompt), targets=None, loss_weights=None)
        left, mean = budget.left, budget.mean
    else:
        example = experiment.example(sample, targets=False)
        prompt = system.processor.rows([[example]], experiment.prompt, targets=False)
        left, mean = tokens_left(system.model, len(example.visual_tokens), tokens_by_span(example))
    return Costs(left, mean, num_params(shapes), flops(system.model, shapes, prompt))


def num_params(shapes: Params) -> dict[str, int]:
    """Parameters of each part, counted by shape."""
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}


def flops(model: nn.Module, shapes: Params, batch: Batch) -> dict[str, int]:
    """FLOPs of the encoder, the connector and the prefill of one prompt, counted by shape.

    Args:
      model: of the point.
      shapes: of its parameters.
      batch: one prompt of the point's processor, or its shapes.
    """
    length, params = batch.tokens.shape[1], {"params": shapes}
    whole = _count(model, "prefill", params, (batch,), length)
    if batch.images is None:
        return {"encoder": 0, "connector": 0, "prefill": whole}
    flat = jax.eval_shape(flat_images, batch.images)
    question = jax.eval_shape(flat_question, batch)
    visual = _count(model, "visual_tokens", params, (flat, batch.instruction, question))
    of_model: Any = model
    both = (flat.wholes, flat.tiles) if isinstance(flat, WholesAndTiles) else None
    seen = [flat] if both is None else [jax.eval_shape(flat_images, part) for part in both]
    encoder = sum(_count(of_model.encoder, "__call__", {"params": shapes["encoder"]}, (part,)) for part in seen)
    return {"encoder": encoder, "connector": visual - encoder, "prefill": whole - visual}


def _count(module: Any, method: str, params: Params, arguments: tuple[Tree, ...], *static: int) -> int:
    """FLOPs of a module's method; points with equal parts, such as the encoder of all, are counted once."""
    leaves, structure = jax.tree.flatten((params, arguments))
    return _counted(module, method, structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves), static)


@functools.lru_cache(maxsize=256)
def _counted(module: Any, method: str, structure: Hashable, leaves: tuple[Any, ...], static: tuple[int, ...]) -> int:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves]
    params, arguments = jax.tree.unflatten(cast(Any, structure), shapes)
    return count_flops(lambda p, *given: module.apply(p, *given, *static, method=method), params, *arguments)
