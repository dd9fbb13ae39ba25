"""The model of the adapters: generation settings that are read or refused, and batches."""

import functools
import logging
import re

import numpy as np
import pytest

import vlm_jax
from tests.advice import tried
from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.harnesses.model import AnswerSettings, HarnessModel, whole_number
from vlm_jax.processors.chat import ChatTemplateError

from ..processes.alphabet import write
from .conftest import asked

SAMPLED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel({"pretrained": str(folder), "token_budget": 4, "reducer": "visionzip", "batch_size": 8})


def requests(settings, count=8):
    return [(functools.partial(asked, number), settings) for number in range(count)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1024, (), Sampling())),
        ({"until": "\n\n", "max_new_tokens": 3, "temperature": None}, (3, ("\n\n",), Sampling())),
        ({"until": ["a", "b"], "temperature": 0, "top_p": 1.0, "num_beams": 1}, (1024, ("a", "b"), Sampling())),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2},
            (1024, (), Sampling(0.0, None, None, 1.2)),
        ),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 5}, (1024, (), Sampling(0.7, None, 0.9, seed=5))),
        ({"do_sample": True, "top_k": 3, "top_p": 1.0}, (1024, (), Sampling(1.0, 3))),
        ({"image_aspect_ratio": "original", "use_cache": True, "top_k": 0}, (1024, (), Sampling())),
    ],
)
def test_settings_are_read(model, given, expected):
    assert model.answer_settings(given) == AnswerSettings(*expected)


@pytest.mark.parametrize("key", ["num_beams", "image_aspect_ratio", "visual_cot"])
def test_other_settings_are_refused_by_name(model, folder, key):
    given = {key: {"num_beams": 4, "image_aspect_ratio": "pad"}.get(key, False), "temperature": 0}
    with pytest.raises(GenerationError, match=tried("is not supported{}; remove it from the request")) as error:
        model.answer_settings(given)
    assert str(error.value).startswith(f"generation setting {key}=") and f"ignore={key}" in str(error.value)
    assert model.answer_settings({"temperature": 0}) == model.answer_settings({})
    ignoring = HarnessModel({"pretrained": str(folder), "ignore": f"{key}+other"})
    assert ignoring.answer_settings({**given, "other": 1}) == ignoring.answer_settings({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": True, "temperature": 0}, "temperature: expected more than 0 with do_sample=true, got 0"),
        ({"temperature": 1.0, "top_p": 0}, "top_p: expected more than 0 and at most 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"max_new_token": 5}, "did you mean 'max_new_tokens'?"),
    ],
)
def test_values_are_checked(model, given, message):
    with pytest.raises(GenerationError) as error:
        model.answer_settings(given)
    assert message in str(error.value)


def test_settings_without_effect_are_told_once(model, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.answer_settings({"top_p": 0.9, "do_sample": False})
    (record,) = caplog.records
    words = tried("{}={} has no effect on greedy answers; set do_sample=true to sample")
    assert re.fullmatch(words, record.getMessage())
    assert model.answer_settings({"top_p": 0.9, "do_sample": True}).sampling == Sampling(1.0, top_p=0.9)


def test_arguments_are_checked(folder):
    with pytest.raises(ConfigError, match=r"model_args\.token_budgets: unknown or unused key; did you mean"):
        HarnessModel({"pretrained": str(folder), "token_budgets": 4})
    with pytest.raises(ConfigError, match=r"model_args\.pretrained: missing"):
        HarnessModel({})
    with pytest.raises(ConfigError, match="batch_size: expected a whole number, got 'auto'"):
        whole_number("auto", "batch_size")
    assert (whole_number("8", "batch_size"), whole_number(8, "batch_size")) == (8, 8)


def test_the_model_thinks_or_not(tmp_path, folder):
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% if enable_thinking %}x{% endif %}")
    request = [(lambda: [{"role": "user", "content": "a"}], AnswerSettings(2, (), Sampling()))]
    for given, text in (({}, "bc"), ({"enable_thinking": True}, "yz"), ({"enable_thinking": False}, "bc")):
        assert HarnessModel({"pretrained": str(tmp_path), **given}).answers(request)[0].text == text
    with pytest.raises(ChatTemplateError, match="unused variable 'enable_thinking'"):
        HarnessModel({"pretrained": str(folder), "enable_thinking": True})


def test_answers_are_those_of_generate(model, folder):
    """Texts, and numbers of tokens: those of the prompt with four visual tokens."""
    alone = vlm_jax.from_pretrained(folder, token_budget=4, reducer="visionzip")
    found = model.answers(requests(model.answer_settings({"max_new_tokens": 4}), 2))
    for number, answer in enumerate(found):
        completion = alone.generate(asked(number), max_new_tokens=4)
        assert (answer.text, answer.new_tokens) == (completion.text, len(completion.tokens))
        assert answer.visual_tokens == 4
        assert answer.prompt_tokens == alone.processor(asked(number)).tokens.shape[1]


def test_a_batch_of_eight_is_eight_batches(model, folder):
    """Greedy and sampled answers, whose random numbers do not depend on the batch, and likelihoods."""
    single = HarnessModel({"pretrained": str(folder), "token_budget": 4, "reducer": "visionzip", "batch_size": 1})
    both = []
    for one in (model, single):
        greedy, sampled = (one.answer_settings(given) for given in ({"max_new_tokens": 4}, SAMPLED))
        asked_for = [
            request for pair in zip(requests(greedy, 3), requests(sampled, 3), strict=True) for request in pair
        ]
        both.append(
            (one.answers(asked_for), one.log_likelihoods([(one_of[0], " red") for one_of in requests(None, 3)]))
        )
    (answers, likelihoods), (answers_alone, likelihoods_alone) = both
    assert answers == answers_alone and len({answer.text for answer in answers}) > 3
    np.testing.assert_allclose(
        [one.log_likelihood for one in likelihoods], [one.log_likelihood for one in likelihoods_alone], rtol=1e-5
    )


def test_an_answer_ends_before_a_stop_string(model):
    """The first of several answers that has a letter after its start."""
    whole = model.answers(requests(model.answer_settings({"max_new_tokens": 6})))
    letters = [
        next((one for one in answer.text[1:] if one.isascii() and one != answer.text[0]), "") for answer in whole
    ]
    number = next(number for number, letter in enumerate(letters) if letter)
    settings = model.answer_settings({"max_new_tokens": 6, "until": ["never said", letters[number]]})
    stopped = model.answers(requests(settings))[number]
    assert stopped.text == whole[number].text.partition(letters[number])[0] and stopped.new_tokens < 6


def test_answers_and_likelihoods_on_several_devices_are_those_of_one(model, folder):
    given = {"pretrained": str(folder), "token_budget": 4, "reducer": "visionzip", "batch_size": 8}
    shared, both = HarnessModel({**given, "mesh": "tensor:2+data:4"}), []
    for one in (model, shared):
        asked_for = requests(one.answer_settings({"max_new_tokens": 4}))
        both.append((one.answers(asked_for), one.log_likelihoods([(ask, " red") for ask, _ in asked_for])))
    (answers, likelihoods), (answers_shared, likelihoods_shared) = both
    assert answers_shared == answers and len({answer.text for answer in answers}) > 1
    np.testing.assert_allclose(
        [one.log_likelihood for one in likelihoods_shared], [one.log_likelihood for one in likelihoods], rtol=1e-5
    )
