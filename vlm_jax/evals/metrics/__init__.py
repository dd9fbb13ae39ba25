"""The metrics, and which one a task has.

A metric is an object of `metric.Metric`. `METRICS` has all of them by name. The metric of a task is that of
`config.evaluation.metrics`, else the one that `BY_TASK` or its own name gives, else `exact`. Of a task such as
`ocr:8x16`, what is before the colon counts.
"""

from collections.abc import Mapping, Sequence

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.evals.metrics.answers import Anls, RelaxedAccuracy, VqaAccuracy
from vlm_jax.evals.metrics.boxes import Box, Boxes
from vlm_jax.evals.metrics.caption import Caption
from vlm_jax.evals.metrics.choice import Choice
from vlm_jax.evals.metrics.html import Html, Teds
from vlm_jax.evals.metrics.metric import Metric, Response
from vlm_jax.evals.metrics.text import Characters, Exact
from vlm_jax.evals.metrics.yes_no import Mme, Pope

__all__ = ["BY_TASK", "METRICS", "Metric", "Response", "chosen_metrics", "metric_of"]

METRICS: Mapping[str, Metric] = {
    "exact": Exact(),
    "vqa_accuracy": VqaAccuracy(),
    "anls": Anls(),
    "relaxed_accuracy": RelaxedAccuracy(),
    "choice": Choice(),
    "pope": Pope(),
    "mme": Mme(),
    "characters": Characters(),
    "box": Box(),
    "boxes": Boxes(),
    "caption": Caption(),
    "teds": Teds(),
    "html": Html(),
}

# Tasks of the data sources, and of benchmarks, whose metric is not `exact`.
BY_TASK: Mapping[str, str] = {
    "locate": "box",
    "ocr": "characters",
    "ocr_line": "characters",
    **dict.fromkeys(("vqav2", "okvqa", "textvqa", "vizwiz"), "vqa_accuracy"),
    **dict.fromkeys(("docvqa", "infovqa", "stvqa"), "anls"),
    "chartqa": "relaxed_accuracy",
    **dict.fromkeys(("ai2d", "mmbench", "mmstar", "scienceqa", "seedbench"), "choice"),
    **dict.fromkeys(("refcoco", "refcoco+", "refcocog"), "box"),
    "grefcoco": "boxes",
    **dict.fromkeys(("coco_caption", "flickr30k", "nocaps", "textcaps"), "caption"),
    "pubtabnet": "teds",
}


def metric_of(task: str, chosen: Mapping[str, str]) -> Metric:
    """The metric of a task.

    Args:
      task: of a sample.
      chosen: names of metrics by task, or by what is before a task's colon; as of `chosen_metrics`.
    """
    kind = task.partition(":")[0]
    default = BY_TASK.get(kind, kind if kind in METRICS else "exact")
    return METRICS[chosen.get(task, chosen.get(kind, default))]


def chosen_metrics(given: Sequence[str], path: str) -> dict[str, str]:
    """{task: name} of choices such as `vqa=anls`.

    Args:
      given: the choices, for tasks with another metric than `BY_TASK` says.
      path: the key or flag that they are from.

    Raises:
      ConfigError: one has another form, a task is chosen for twice, or a metric does not exist.
    """
    chosen: dict[str, str] = {}
    for choice in given:
        task, _, name = choice.partition("=")
        if not task or not name:
            raise ConfigError(f"{path}: expected task=metric, as in vqa=anls, got '{choice}'")
        if task in chosen:
            raise ConfigError(f"{path}: expected one metric for task '{task}', got '{chosen[task]}' and '{name}'")
        if name not in METRICS:
            near = did_you_mean(name, METRICS)
            raise ConfigError(f"{path}: task '{task}': there is no metric '{name}'{near}")
        chosen[task] = name
    return chosen
