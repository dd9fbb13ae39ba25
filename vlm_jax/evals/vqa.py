"""Accuracy of generated answers per task, with 95% intervals."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.build import Experiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.evals.intervals import wilson_interval
from vlm_jax.evals.metrics import Metric, Response, chosen_metrics, metric_of
from vlm_jax.generation.text import Completion
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.processor import Example
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import TEXT_SLOT, Params, Sample

# What bounds a prompt.
METRICS_KEY = "config.evaluation.metrics"
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
      correct: whether that counts as right, or how much of it, in [0, 1]; by the task's metric.
      visual_tokens: of each of the sample's images, how many reached the decoder.
      tokens_by_span: visual tokens of the prompt in the decoder's first layers, and after each drop.
      references: what the answer was compared with, all right answers as the tokenizer writes them if that is nearer.
      group: of the answers about the same pictures, or of the same conversation.
      is_finished: whether the answer has an end.
      turns: questions of the conversation up to this answer; those before have the answers of the record.
    """

    sample_id: str
    task: str
    question: str
    reference: str
    text: str
    correct: bool | float
    visual_tokens: tuple[int, ...] = ()
    tokens_by_span: tuple[int, ...] = (0,)
    references: tuple[str, ...] = ()
    group: str = ""
    is_finished: bool = True
    turns: int = 1


def judged(metric: Metric, tokenizer: Tokenizer, response: Response) -> tuple[bool | float, Response]:
    """The score of an answer, and the answer with the references that it was compared with.

    A tokenizer may write a text in another way, as in lower case; an answer of the model can only equal the references
    as its tokenizer writes them. The better one of the scores with these and with the given ones counts.
    """
    spelled = tuple(_spelled(tokenizer, text) for text in response.references)
    variants = [response]
    if spelled != response.references:
        variants.append(dataclasses.replace(response, references=spelled))
    scores = [metric.score(variant) for variant in variants]
    best = max(scores)
    return best, variants[scores.index(best)]


def _spelled(tokenizer: Tokenizer, text: str) -> str:
    """A reference as the tokenizer writes it, if with anything."""
    spelled = tokenizer.decode(tokenizer.encode(text))
    return spelled if spelled.strip() else text


def judged_answer(
    metrics: Mapping[str, str], tokenizer: Tokenizer, sample: Sample, completion: Completion
) -> tuple[bool | float, Response]:
    """As `judged`, for a generated answer to the last question of a sample; `metrics` as of `metric_of`."""
    references = sample.references or (sample.answer,)
    finished = completion.reason == "end"
    response = Response(completion.text, references, sample.question, group_of(sample), finished)
    return judged(metric_of(sample.task, metrics), tokenizer, response)


def group_of(sample: Sample) -> str:
    """A digest of the pictures and videos of a sample, or without any its name; of a part, those of its whole sample.

    All questions of a conversation are in one group, since their answers depend on each other.
    """
    if sample.whole is not None:
        return group_of(sample.whole)
    if not sample.images and not sample.videos:
        return sample.sample_id
    digest = hashlib.blake2b(digest_size=8)
    for image in sample.images:
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
    for video in sample.videos:
        digest.update(video.encode() if isinstance(video, str) else video)
    return digest.hexdigest()


def num_turns(sample: Sample) -> int:
    """Questions of a sample's conversation; the last one is answered."""
    return sum(message["role"] == "user" for message in sample.messages)


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
    chosen = chosen_metrics(settings.metrics, METRICS_KEY)
    params = experiment.system.prepared(params)  # once for all batches
    size, samples = settings.batch_size, iter(samples)
    while group := list(itertools.islice(samples, size)):
        yield from _answered(experiment, params, group, settings, chosen)


def _answered(
    experiment: Experiment,
    params: Params,
    group: Sequence[Sample],
    settings: EvaluationSettings,
    chosen: Mapping[str, str],
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
    )
    places = np.count_nonzero(prompts.visual_index != TEXT_SLOT, axis=1).tolist()
    for sample, example, completion, shown in zip(group, examples, completed, places, strict=False):
        counts, text = example.visual_tokens, completion.text
        if sum(counts) != shown:
            raise ValueError(f"sample '{sample.sample_id}': {counts} visual tokens are to fill {shown} places")
        correct, judged_as = judged_answer(chosen, system.processor.tokenizer, sample, completion)
        asked = sample.sample_id, sample.task, sample.question, sample.answer
        compared = judged_as.references, judged_as.group, judged_as.is_finished
        yield Answer(*asked, text, correct, counts, tokens_by_span(example), *compared, num_turns(sample))


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
