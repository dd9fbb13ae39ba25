"""Accuracy of generated answers per task, with 95% intervals."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vlm_jax.build import Experiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.generation.engine import generate, prepared
from vlm_jax.processors.boxes import intersection_over_union, parse_boxes
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.processor import Example
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.sharding.mesh import CONTEXT
from vlm_jax.sharding.rules import mesh_of
from vlm_jax.types import TEXT_SLOT, Load, Params, Sample

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
MIN_IOU = 0.5
# What bounds a prompt.
KEYS = {
    "positions": "config.evaluation.question_length",
    "tiles or patches": "config.data.num_images",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sample, the model's answer, and whether it is correct.

    Attributes:
      sample: what was asked.
      text: what the model said.
      correct: whether that counts as right.
      visual_tokens: of each of the sample's images, how many reached the decoder.
      load: what its prompt takes of a row.
    """

    sample: Sample
    text: str
    correct: bool
    visual_tokens: tuple[int, ...] = ()
    load: Load = dataclasses.field(default_factory=lambda: Load(0, 0))


def exact(answer: str, reference: str) -> bool:
    """Equality of texts, ignoring spaces at the ends."""
    return answer.strip() == reference.strip()


def overlap(answer: str, reference: str) -> bool:
    """Whether the answer has exactly one box, with an intersection over union of at least 0.5 with the reference's."""
    boxes, wanted = parse_boxes(answer), parse_boxes(reference)
    return len(boxes) == 1 and intersection_over_union(boxes[0], wanted[0]) >= MIN_IOU


# Tasks with another metric than exact match.
SCORERS: dict[str, Callable[[str, str], bool]] = {"locate": overlap}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion.

    Raises:
      ValueError: no trials.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if trials < 1:
        raise ValueError("expected at least one trial, got none")
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def answer_all(
    experiment: Experiment, params: Params, samples: Iterable[Sample], settings: EvaluationSettings
) -> list[Answer]:
    """Generates an answer to the last question of every sample; the last batch is padded by repeats.

    Raises:
      SequenceTooLong: a prompt is longer than `config.evaluation.question_length` allows, or a reference answer
        longer than `max_new_tokens`.
      ValueError: the number of visual tokens in a prompt differs from that of its images.
    """
    samples, mesh = list(samples), mesh_of(params)
    if mesh is not None and mesh.shape[CONTEXT] > 1:
        mesh = None  # generation does not shard the sequence
    params = prepared(params, mesh)  # once for all batches
    system, shape, size = experiment.system, experiment.prompt, settings.batch_size
    processor, answers = system.processor, []
    for sample in samples:
        _check_reference(processor.tokenizer, sample, settings.max_new_tokens)
    for start in range(0, len(samples), size):
        group = samples[start : start + size]
        examples = [experiment.example(sample, targets=False) for sample in group]
        padded = examples + [examples[-1]] * (size - len(group))
        batch = processor.rows([[example] for example in padded], shape, targets=False, keys=KEYS)
        ids = generate(
            system.model,
            params,
            batch,
            max_new_tokens=settings.max_new_tokens,
            end_ids=system.ends,
            pad_id=processor.pad_id,
            buckets=None if shape is None else (shape.length,),
            names=[f"sample '{example.name}'" for example in padded],
            mesh=mesh,
        ).tokens
        places = np.count_nonzero(batch.visual_index != TEXT_SLOT, axis=1).tolist()
        for sample, example, row, shown in zip(group, examples, ids.tolist(), places, strict=False):
            ended = next((number for number, index in enumerate(row) if index in system.ends), None)
            text = processor.tokenizer.decode(row[:ended])
            correct = ended is not None and SCORERS.get(sample.task, exact)(text, sample.answer)
            counts = example.visual_tokens
            if sum(counts) != shown:
                raise ValueError(f"sample '{sample.sample_id}': {counts} visual tokens are to fill {shown} places")
            answers.append(Answer(sample, text, correct, counts, example.load))
    return answers


def _check_reference(tokenizer: Tokenizer, sample: Sample, max_new_tokens: int) -> None:
    length = len(tokenizer.encode(sample.answer)) + 1
    if length > max_new_tokens:
        raise SequenceTooLong(
            f"sample '{sample.sample_id}': its reference answer has {length} tokens with the end token, over the limit "
            f"of {max_new_tokens}; raise config.evaluation.max_new_tokens"
        )


def realised_tokens(answers: Iterable[Answer]) -> dict[str, float | int]:
    """{"mean", "max"} of the visual tokens of an image, over all images; 0 without images."""
    counts = [count for answer in answers for count in answer.visual_tokens]
    mean = sum(counts) / max(len(counts), 1)
    return {"mean": short(mean), "max": max(counts, default=0)}


def tokens_left(model: Any, prompts: Sequence[Answer] | Sequence[Example]) -> tuple[float | int, float | int]:
    """Visual tokens of an image in the decoder's last layer, and their mean over its layers; over all images.

    Args:
      model: a `VLM` with a decoder.
      prompts: with the visual tokens of their images, and what they take of a row.
    """
    images = max(sum(len(prompt.visual_tokens) for prompt in prompts), 1)
    spans = zip(*(_tokens_by_span(sum(prompt.visual_tokens), prompt.load) for prompt in prompts), strict=True)
    tokens = [sum(span) / images for span in spans]
    layers = itertools.pairwise((0, *(drop.layer for drop in model.decoder.drops), model.decoder.depth))
    total = sum(count * (stop - start) for count, (start, stop) in zip(tokens, layers, strict=True))
    return short(tokens[-1]), short(total / model.decoder.depth)


def _tokens_by_span(entering: int, load: Load) -> list[int]:
    """Visual tokens of a prompt in the decoder's first layers, and behind each drop."""
    return [entering, *(entering - (load.length - kept) for kept in load.kept)]


def short(number: float) -> float | int:
    """A whole number as an int."""
    return int(number) if number.is_integer() else number


def accuracy(answers: Iterable[Answer]) -> dict[str, dict[str, float | int]]:
    """{task: {"mean", "low", "high", "n"}}, with Wilson's 95% interval."""
    by_task: dict[str, list[bool]] = {}
    for answer in answers:
        by_task.setdefault(answer.sample.task, []).append(answer.correct)
    return {task: share(sum(results), len(results)) for task, results in by_task.items()}


def share(successes: int, trials: int) -> dict[str, float | int]:
    """{"mean", "low", "high", "n"} of a proportion, with Wilson's 95% interval."""
    low, high = wilson_interval(successes, trials)
    return {"mean": successes / trials, "low": low, "high": high, "n": trials}
