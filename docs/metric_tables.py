"""The page of the metrics and of the tasks that have them, from `vlm_jax.evals.metrics`."""

import inspect

from docstrings import escaped, summary

from vlm_jax.evals.metrics import BY_TASK, METRICS

HEAD = """# Metrics

The metric of a task is that of `--metrics` or `config.evaluation.metrics`, else the one of its name or of the last
column, else `exact`. Of a task such as `ocr:8x16`, what is before the colon counts. Every value has a 95% bootstrap
interval in which answers about the same images are drawn together.

| metric | what it says of an answer | values of many answers | source | tasks |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page as Markdown."""
    rows = []
    for name, metric in METRICS.items():
        cls = type(metric)
        values = ", ".join(f"`{value}`" for value in metric.values)
        tasks = ", ".join(f"`{task}`" for task, own in BY_TASK.items() if own == name)
        rows.append(f"| `{name}` | {escaped(summary(cls))} | {values} | {escaped(_source(cls))} | {tasks} |")
    return HEAD + "\n".join(rows) + "\n"


def _source(cls: type) -> str:
    """What follows `Source:` in a docstring, or in that of its module."""
    for doc in (inspect.getdoc(cls), inspect.getdoc(inspect.getmodule(cls))):
        if doc and "Source: " in doc:
            return doc.split("Source: ")[1].split("\n\n")[0]
    return ""
