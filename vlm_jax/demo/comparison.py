"""The table that compares an answer at a token budget with that at the full one."""

from vlm_jax.demo.answer import Answer

MISSING = "–"


def comparison(budget: Answer, full: Answer) -> list[tuple[str, str, str, str]]:
    """Rows of: what, at the budget, at the full budget, and their ratio; "–" where a number is missing.

    Ratios are full / budget: how many times fewer tokens, and how many times faster. Visual tokens of a reducer in the
    decoder are those of each span of layers, and the ratio is that of the last layers.
    """
    done = [answer.completion for answer in (budget, full)]
    tokens = [() if completion is None else completion.visual_tokens for completion in done]
    lengths = [MISSING if completion is None else str(len(completion.tokens)) for completion in done]
    spans = [" → ".join(map(str, dict.fromkeys(counts))) or MISSING for counts in tokens]
    last = [counts[-1] if counts else None for counts in tokens]
    return [
        ("Visual tokens", spans[0], spans[1], _ratio(*last)),
        ("Seconds to the first text", *_seconds(budget.first_seconds, full.first_seconds)),
        ("Seconds in all", *_seconds(budget.seconds, full.seconds)),
        ("Tokens of the answer", lengths[0], lengths[1], ""),
    ]


def _seconds(budget: float | None, full: float | None) -> tuple[str, str, str]:
    shown = [MISSING if seconds is None else f"{seconds:.3g}" for seconds in (budget, full)]
    return shown[0], shown[1], _ratio(budget, full)


def _ratio(budget: float | int | None, full: float | int | None) -> str:
    return f"{full / budget:.2g} ×" if budget and full is not None else MISSING
