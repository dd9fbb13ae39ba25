"""Accuracy of generated answers per task, with 95% intervals."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vlm_jax.build import Experiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.data.spelling import edits
from vlm_jax.evals.intervals import wilson_interval
from vlm_jax.generation.engine import prepared
from vlm_jax.generation.text import Completion
from vlm_jax.processors.boxes import intersection_over_union, parse_boxes
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.normal_form import composed
from vlm_jax.processors.processor import Example
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.sharding.mesh import CONTEXT
from vlm_jax.sharding.rules import mesh_of
from vlm_jax.types import TEXT_SLOT, Params, Sample

MIN_IOU = 0.5
# What bounds a prompt.
KEYS = {
    "positions": "config.evaluation.question_length",
    "tiles or patches": "config.data.num_images",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's answer to one sample, whose pictures are not kept.

    Attributes:
      sample_id: name of the sample.
      task: of the question.
      question: the text of the last message before the answer.
      reference: the right answer.
      text: what the model said.
      correct: whether that counts as right, or for tasks of `FRACTIONS` how much of it, in [0, 1].
      visual_tokens: of each of the sample's images, how many reached the decoder.
      tokens_by_span: visual tokens of the prompt in the decoder's first layers, and after each drop.
    """

    sample_id: str
    task: str
    question: str
    reference: str
    text: str
    correct: bool | float
    visual_tokens: tuple[int, ...] = ()
    tokens_by_span: tuple[int, ...] = (0,)


def exact(answer: str, reference: str) -> bool:
    """Equality of texts, ignoring spaces at the ends and how Unicode composes a character."""
    return composed(answer).strip() == composed(reference).strip()


def overlap(answer: str, reference: str) -> bool:
    """Whether the answer has exactly one box, with an intersection over union of at least 0.5 with the reference's."""
    boxes, wanted = parse_boxes(answer), parse_boxes(reference)
    return len(boxes) == 1 and intersection_over_union(boxes[0], wanted[0]) >= MIN_IOU


def character_precision(answer: str, reference: str) -> float:
    """1 - Levenshtein's distance, as a share of the longer of the two texts; spaces at their ends are ignored.

    Source: the normalized edit distance of OmniDocBench, subtracted from 1. DeepSeek-OCR (arXiv 2510.18234, figure 1)
    reports a precision by text tokens per visual token, without a formula.
    """
    answer, reference = composed(answer).strip(), composed(reference).strip()
    return 1.0 - edits(answer, reference) / max(len(answer), len(reference), 1)


# Tasks with another metric than exact match. Of a task such as `ocr:8x16`, what is before the colon counts.
SCORERS: dict[str, Callable[[str, str], bool]] = {"locate": overlap}
# Tasks whose answers may be partly right. An answer without an end counts as far as it was written.
FRACTIONS: dict[str, Callable[[str, str], float]] = {"ocr": character_precision, "ocr_line": character_precision}


def score(tokenizer: Tokenizer, task: str, completion: Completion, reference: str) -> bool | float:
    """Whether a generated answer is right, or for tasks of `FRACTIONS` how much of it, in [0, 1]."""
    metric = FRACTIONS.get(_kind(task))
    if metric is None:
        return completion.reason == "end" and is_right(tokenizer, task, completion.text, reference)
    return max(metric(completion.text, text) for text in _spellings(tokenizer, reference))


def _kind(task: str) -> str:
    return task.partition(":")[0]


def _spellings(tokenizer: Tokenizer, reference: str) -> tuple[str, ...]:
    """A reference answer, and how the tokenizer writes it, if with anything."""
    spelled = tokenizer.decode(tokenizer.encode(reference))
    return (reference, spelled) if spelled.strip() and spelled != reference else (reference,)


def is_right(tokenizer: Tokenizer, task: str, answer: str, reference: str) -> bool:
    """Whether an answer counts as right, by the task's metric.

    A tokenizer may write a text in another way, as in lower case; an answer of the model can only equal the reference
    as its tokenizer writes it, which counts as well.
    """
    scorer = SCORERS.get(_kind(task), exact)
    return any(scorer(answer, text) for text in _spellings(tokenizer, reference))


def generation_mesh(params: Params) -> Mesh | None:
    """The mesh of parameters, where they generate on it: not where it shards the sequence."""
    mesh = mesh_of(params)
    return None if mesh is None or mesh.shape[CONTEXT] > 1 else mesh


def answers(
    experiment: Experiment, params: Params, samples: Iterable[Sample], settings: EvaluationSettings
) -> Iterator[Answer]:
    """Generates an answer to the last question of every sample, as `System.answer` does.

    Samples are read one batch at a time; the last batch is padded by repeats of its last sample.

    Raises:
      SequenceTooLong: a prompt is longer than `config.evaluation.question_length` allows, or a reference answer
        longer than `max_new_tokens`.
      ValueError: the number of visual tokens in a prompt differs from that of its images.
    """
    mesh = generation_mesh(params)
    params = prepared(params, mesh)  # once for all batches
    size, samples = settings.batch_size, iter(samples)
    while group := list(itertools.islice(samples, size)):
        yield from _answered(experiment, params, group, settings, mesh)


def _answered(
    experiment: Experiment, params: Params, group: Sequence[Sample], settings: EvaluationSettings, mesh: Mesh | None
) -> Iterator[Answer]:
    """Answers to at most `batch_size` samples."""
    system, shape = experiment.system, experiment.prompt
    references = ((sample.sample_id, sample.answer) for sample in group)
    check_references(system.processor.tokenizer, references, settings.max_new_tokens)
    examples = [experiment.example(sample, targets=False) for sample in group]
    padded = examples + [examples[-1]] * (settings.batch_size - len(group))
    prompts = system.processor.rows([[example] for example in padded], shape, targets=False, keys=KEYS)
    completed = system.complete(
        params,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        names=[f"sample '{example.name}'" for example in padded],
        buckets=None if shape is None else (shape.length,),
        mesh=mesh,
    )
    places = np.count_nonzero(prompts.visual_index != TEXT_SLOT, axis=1).tolist()
    for sample, example, completion, shown in zip(group, examples, completed, places, strict=False):
        counts, text = example.visual_tokens, completion.text
        if sum(counts) != shown:
            raise ValueError(f"sample '{sample.sample_id}': {counts} visual tokens are to fill {shown} places")
        correct = score(system.processor.tokenizer, sample.task, completion, sample.answer)
        asked = sample.sample_id, sample.task, sample.question, sample.answer
        yield Answer(*asked, text, correct, counts, tokens_by_span(example))


def check_references(
    tokenizer: Tokenizer,
    references: Iterable[tuple[str, str]],
    max_new_tokens: int,
    key: str = "config.evaluation.max_new_tokens",
) -> None:
    """Checks that generated answers can be as long as the reference answers.

    Args:
      tokenizer: of the answers.
      references: names of samples, and their reference answers.
      max_new_tokens: maximum tokens of an answer, including its end token.
      key: what sets it, for messages.

    Raises:
      SequenceTooLong: naming the first sample whose reference is longer.
    """
    for name, reference in references:
        length = len(tokenizer.encode(reference)) + 1
        if length > max_new_tokens:
            raise SequenceTooLong(
                f"sample '{name}': its reference answer has {length} tokens with the end token, over the limit of "
                f"{max_new_tokens}; raise {key}"
            )


def tokens_left(model: Any, num_images: int, spans: Sequence[int]) -> tuple[float | int, float | int]:
    """Visual tokens of an image in the decoder's last layer, and their mean over its layers; over all images.

    Args:
      model: a `VLM` with a decoder.
      num_images: of all prompts.
      spans: `tokens_by_span`, summed over all prompts.
    """
    tokens = [total / max(num_images, 1) for total in spans]
    layers = itertools.pairwise((0, *(drop.layer for drop in model.decoder.drops), model.decoder.depth))
    total = sum(count * (stop - start) for count, (start, stop) in zip(tokens, layers, strict=True))
    return short(tokens[-1]), short(total / model.decoder.depth)


def tokens_by_span(prompt: Example) -> tuple[int, ...]:
    """Visual tokens of a prompt in the decoder's first layers, and after each drop."""
    entering = sum(prompt.visual_tokens)
    return (entering, *(entering - (prompt.load.length - kept) for kept in prompt.load.kept))


def short(number: float) -> float | int:
    """A whole number as an int."""
    return int(number) if number.is_integer() else number


def share(successes: int | float, trials: int) -> dict[str, float | int]:
    """{"mean", "low", "high", "n"} of a proportion, with Wilson's 95% interval.

    Where trials may be partly right, the interval is wider than it need be: no variable in [0, 1] has a greater
    variance than one of 0 and 1 with the same mean.
    """
    low, high = wilson_interval(successes, trials)
    return {"mean": successes / trials, "low": low, "high": high, "n": trials}
