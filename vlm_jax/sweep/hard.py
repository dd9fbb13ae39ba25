"""The questions that a smaller picture cannot answer.

Where downscaling the picture to as few tokens answers a question as well, no method can show that it keeps more; so
points are scored by themselves on the questions that the control `downsample_image` gets wrong at the same budget
(VTC-Bench, arXiv 2510.07143). Where answers are partly right, these are the ones that it does not get wholly right.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.evals.tally import Tally
from vlm_jax.types import Fields

DOWNSAMPLED = "downsample_image"


def with_hard_questions(
    results: Sequence[Mapping[str, Any]], control: str | None, answers: Callable[[str], Iterable[Fields]]
) -> list[dict[str, Any]]:
    """The lines of `results.jsonl` with `hard_accuracy`, as `accuracy`, where the control has the budget and the seed.

    Args:
      results: lines of `results.jsonl`.
      control: `connector` of the control that downsamples the picture; None if there is none.
      answers: label -> lines of its `answers.jsonl`.

    Raises:
      ValueError: points of one seed answered other questions.
    """
    controls = {
        (result["token_budget"], result["seed"]): result["label"]
        for result in results
        if result["connector"] == control
    }
    scored = []
    for result in results:
        label, tally = controls.get((result["token_budget"], result["seed"])), Tally()
        if label is not None:
            # All points of a seed answer the same questions in the same order; no file is held.
            for of_control, line in zip(answers(label), answers(result["label"]), strict=True):
                if of_control["sample_id"] != line["sample_id"]:
                    raise ValueError(
                        f"answers of {label} and {result['label']} differ in their questions: "
                        f"{of_control['sample_id']} and {line['sample_id']}; use another --workdir"
                    )
                if of_control["correct"] < 1:
                    tally.add({"visual_tokens": (), "tokens_by_span": (), **line})
        scored.append({**result, "hard_accuracy": tally.accuracy()})
    return scored
