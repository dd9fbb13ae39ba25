"""Groups of questions that need different things of a picture: reading, finding, and a conversation of several turns.

Methods of token reduction differ most between them: text needs many tokens, a box needs their positions, and tokens
that were chosen for the first question may lack what a later one asks for. The group of a question follows from its
task, by `BY_TASK` or else by the task's metric; a question after others of its conversation is also of `MULTI_TURN`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.evals.metrics import METRICS, metric_of

OCR, GROUNDING, MULTI_TURN = "OCR", "grounding", "multi-turn"

# Tasks of the data sources and of benchmarks whose metric says nothing of their group.
BY_TASK: Mapping[str, str] = dict.fromkeys(
    ("read", "transcribe", "textvqa", "textcaps", "ocrvqa", "ocrbench", "mme:OCR"), OCR
)
BY_METRIC: Mapping[str, str] = {
    **dict.fromkeys(("anls", "characters", "relaxed_accuracy", "teds", "html"), OCR),
    **dict.fromkeys(("box", "boxes"), GROUNDING),
}
_BY_CLASS = {type(METRICS[name]): group for name, group in BY_METRIC.items()}


def group_of_task(task: str, chosen: Mapping[str, str]) -> str | None:
    """OCR, GROUNDING, or None.

    Args:
      task: of a sample; of `ocr:8x16` what is before the colon counts where the whole is not in `BY_TASK`.
      chosen: names of metrics by task, as of `metric_of`.
    """
    kind = task.partition(":")[0]
    named = BY_TASK.get(task, BY_TASK.get(kind))
    return _BY_CLASS.get(type(metric_of(task, chosen))) if named is None else named


def is_multi_turn(row: Mapping[str, Any]) -> bool:
    """Whether a row of answers is to a question after others of its conversation, by its `turns`."""
    return row["turns"] > 1
