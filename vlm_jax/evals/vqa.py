"""Accuracy of generated answers, task by task, with 95% intervals."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vlm_jax.build import System
from vlm_jax.generation.engine import generate, prepared
from vlm_jax.processors.boxes import intersection_over_union, parse_boxes
from vlm_jax.sharding.mesh import CONTEXT
from vlm_jax.sharding.rules import mesh_of
from vlm_jax.types import TEXT_SLOT, Sample

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
MIN_IOU = 0.5


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """`config.evaluation`.

    Attributes:
      batch_size: prompts that are answered together.
    """

    batch_size: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sample, what the model said, and whether it counts as right.

    Attributes:
      sample: what was asked.
      text: what the model said.
      correct: whether that counts as right.
      visual_tokens: of each of the sample's images, how many reached the decoder.
    """

    sample: Sample
    text: str
    correct: bool
    visual_tokens: tuple[int, ...] = ()


def exact(answer: str, reference: str) -> bool:
    """The same text, spaces at the ends aside."""
    return answer.strip() == reference.strip()


def overlap(answer: str, reference: str) -> bool:
    """Exactly one box, overlapping the reference's with an intersection over union of 0.5 or more."""
    boxes, wanted = parse_boxes(answer), parse_boxes(reference)
    return len(boxes) == 1 and intersection_over_union(boxes[0], wanted[0]) >= MIN_IOU


# Tasks that are not scored by exact match.
SCORERS: dict[str, Callable[[str, str], bool]] = {"locate": overlap}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion.

    Raises:
      ValueError: no trials.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def answer_all(system: System, params: dict[str, Any], samples: Iterable[Sample], batch_size: int) -> list[Answer]:
    """Generates an answer to the first question of every sample; the last batch is padded by repeats.

    Raises:
      ValueError: an image takes more visual tokens than its budget, or a prompt has another number of
        places for them.
    """
    samples, mesh = list(samples), mesh_of(params)
    if mesh is not None and mesh.shape[CONTEXT] > 1:
        mesh = None  # new tokens come one by one, and are not shared out over it
    params = prepared(params, mesh)  # once for all batches
    processor, tokenizer = system.processor, system.processor.tokenizer
    answers = []
    for start in range(0, len(samples), batch_size):
        group = samples[start : start + batch_size]
        padded = group + [group[-1]] * (batch_size - len(group))
        batch = jax.tree.map(lambda *rows: np.concatenate(rows), *[processor.prompt(sample) for sample in padded])
        ids = generate(
            system.model,
            params,
            batch,
            max_new_tokens=processor.max_answer_length,
            end_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
            buckets=(batch.tokens.shape[1],),
            names=[f"sample '{sample.sample_id}'" for sample in padded],
            mesh=mesh,
        ).tokens
        places = np.count_nonzero(batch.visual_index != TEXT_SLOT, axis=1).tolist()
        for sample, row, shown in zip(group, ids.tolist(), places, strict=False):
            ended = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
            text, turn = tokenizer.decode(ended), sample.turns[0]
            correct = tokenizer.eos_id in row and SCORERS.get(turn.task, exact)(text, turn.answer)
            counts = processor.visual_tokens(sample)
            if sum(counts) != shown:
                raise ValueError(f"sample '{sample.sample_id}': {counts} visual tokens are to fill {shown} places")
            answers.append(Answer(sample, text, correct, counts))
    return answers


def realised_tokens(answers: Iterable[Answer]) -> dict[str, float | int]:
    """{"mean", "max"} of the visual tokens of an image, over all images; 0 where there are none."""
    counts = [count for answer in answers for count in answer.visual_tokens]
    mean = sum(counts) / max(len(counts), 1)
    return {"mean": int(mean) if mean.is_integer() else mean, "max": max(counts, default=0)}


def accuracy(answers: Iterable[Answer]) -> dict[str, dict[str, float | int]]:
    """{task: {"mean", "low", "high", "n"}}, the interval being Wilson's at 95%."""
    by_task: dict[str, list[bool]] = {}
    for answer in answers:
        by_task.setdefault(answer.sample.turns[0].task, []).append(answer.correct)
    table = {}
    for task, results in by_task.items():
        low, high = wilson_interval(sum(results), len(results))
        table[task] = {"mean": sum(results) / len(results), "low": low, "high": high, "n": len(results)}
    return table
