"""Times of generation against a clock that the answers turn themselves."""

import time

import pytest

from configs import base
from vlm_jax.build import build_conversational
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.evals.timing import generation_seconds
from vlm_jax.generation.text import Completion
from vlm_jax.system import System


@pytest.fixture
def experiment():
    config = base.get_config()
    config.data.evaluation_size = 1
    return build_conversational(config)


def answering(monkeypatch, length):
    """Answers of so many tokens: 3 s for a prompt and its first token, 0.5 s for each further one, 100 s to compile."""
    now, programs = [0.0], set()

    def complete(system, params, prompts, *, max_new_tokens, names, **options):
        steps = min(length, max_new_tokens) - 1
        first = {"prefill", *(["decode"] if steps else [])} - programs
        programs.update(first)
        now[0] += 100 * len(first) + 3 + 0.5 * steps
        return [Completion("7", (1,) * (steps + 1), "end") for _ in names]

    monkeypatch.setattr(System, "complete", complete)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


@pytest.mark.parametrize(
    ("length", "expected"),
    [(5, {"prefill_seconds": 3 / 6, "decode_seconds": 0.5 / 6}), (1, {"prefill_seconds": 3 / 6})],
)
def test_times_are_of_one_example_and_one_token_without_compilation(experiment, monkeypatch, length, expected):
    answering(monkeypatch, length)
    samples = experiment.open_source().evaluation(0)  # four, which fill a batch of six
    settings = EvaluationSettings(batch_size=6, question_length=8, max_new_tokens=24)
    assert generation_seconds(experiment, {}, samples, settings) == pytest.approx(expected)
