"""The table that compares an answer at a token budget with that at the full one."""

from collections.abc import Sequence

from vlm_jax.demo.trial import Answer

MISSING = "–"


def comparison(budget: Answer, full: Answer) -> list[tuple[str, str, str, str]]:
    """Rows of: what, at the budget, at the full budget, and their ratio; "–" where a number is missing.

    Ratios are full / budget: how many times fewer tokens, and how many times faster.
    """
    return [
        ("Visual tokens", _counts(budget.visual_tokens), _counts(full.visual_tokens), _tokens_ratio(budget, full)),
        _row("Seconds to the first text", budget.first_seconds, full.first_seconds),
        _row("Seconds in all", budget.seconds, full.seconds),
        ("Tokens of the answer", _count(budget), _count(full), ""),
    ]


def _counts(tokens: Sequence[int]) -> str:
    """Of a reducer in the decoder, the tokens of each span of layers."""
    return " → ".join(map(str, dict.fromkeys(tokens))) or MISSING


def _count(answer: Answer) -> str:
    return MISSING if answer.completion is None else str(answer.num_tokens)


def _tokens_ratio(budget: Answer, full: Answer) -> str:
    """Of the tokens in the last layers."""
    if not budget.visual_tokens or not full.visual_tokens:
        return MISSING
    return _ratio(budget.visual_tokens[-1], full.visual_tokens[-1])


def _row(what: str, budget: float | None, full: float | None) -> tuple[str, str, str, str]:
    shown = [MISSING if seconds is None else f"{seconds:.3g}" for seconds in (budget, full)]
    return what, shown[0], shown[1], MISSING if budget is None or full is None else _ratio(budget, full)


def _ratio(budget: float | int, full: float | int) -> str:
    return f"{full / budget:.2g} ×" if budget else MISSING
