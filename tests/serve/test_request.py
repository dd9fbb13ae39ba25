"""The keys of a request by themselves."""

import dataclasses
import json

import pytest

from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.serve.request import NEUTRAL, read_request

from .conftest import asked

RELEASE = Sampling(repetition_penalty=1.25, no_repeat_ngram=3)


def read(**more):
    return read_request(json.dumps(asked("a", **more)).encode())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RELEASE),
        ({"temperature": 0, "top_p": 1, "seed": 3}, dataclasses.replace(RELEASE, seed=3)),
        ({"temperature": 0.5, "top_p": 0.5, "top_k": 4, "seed": 2**32 + 7}, Sampling(0.5, 4, 0.5, 1.25, 7, 3)),
        ({"temperature": 2, "seed": -1, "repetition_penalty": 1}, Sampling(2.0, seed=2**32 - 1, no_repeat_ngram=3)),
    ],
)
def test_sampling_settings(keys, expected):
    found = read(**keys).sampling(RELEASE)
    assert found.values() == expected.values()


def test_requests_without_a_seed_draw_differently():
    drawn = {read(temperature=1.0).sampling(RELEASE).seed for _ in range(10)}
    assert len(drawn) > 5 and all(0 <= seed < 2**32 for seed in drawn)


def test_a_key_that_is_null_or_asks_for_nothing_is_as_good_as_missing():
    plain = read()
    assert read(**dict.fromkeys(NEUTRAL)) == plain == read(stop=None, n=None, metadata={"a": "b"}, user="me")
    for key, values in NEUTRAL.items():
        for value in values:
            assert read(**{key: value}) == plain
        with pytest.raises(ConfigError, match=rf"request\.{key}: is not supported by this server"):
            read(**{key: {"other": 1}})


def test_stop_strings_and_limits():
    assert read(stop="a").stops == ("a",) and read(stop=["a", "b"]).stops == ("a", "b") and read().stops == ()
    assert read(max_tokens=3).limit == read(max_completion_tokens=3).limit == 3 and read().limit is None
    assert len(read(stop=["a"] * 16).stops) == 16
    with pytest.raises(ConfigError, match=r"request\.stop: expected at most 16 strings"):
        read(stop=["a"] * 17)


def test_top_p_needs_a_temperature():
    with pytest.raises(GenerationError, match="top_p: is unused at temperature 0"):
        read(top_p=0.5).sampling(RELEASE)
    assert read(top_p=0.5, temperature=1).sampling(RELEASE).top_p == 0.5
