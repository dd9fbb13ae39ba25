"""Every key of the configs with values of other types and out of range: one ConfigError, before anything is built."""

import contextlib
import math

import pytest
from ml_collections import ConfigDict

from configs import base, digits_stages, finetune, finetune_towers, siglip_digits
from vlm_jax.build import build
from vlm_jax.build import sections as build_sections
from vlm_jax.config import ConfigError, plain
from vlm_jax.train import check as checks
from vlm_jax.train.check import check_config

VALUES = (1, "1", 0, -1, 2**31, math.nan, math.inf, True, None, (), (1,), (0, 0), {}, {"a": 1}, "x", 1.5, 7)
CONFIGS = {
    "base": lambda: _with_stage(base.get_config()),
    "finetune": finetune.get_config,
    "towers": finetune_towers.get_config,
    "siglip": siglip_digits.get_config,
}


def _with_stage(config):
    config.stages, config.schedule = ConfigDict({"answering": digits_stages.instruction().to_dict()}), ("answering",)
    return config


def tuples(value):
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def paths(section, at=()):
    for key, value in section.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


def changed(section, path, value):
    rest = value if len(path) == 1 else changed(section[path[0]], path[1:], value)
    return {**section, path[0]: rest}


def is_same_kind(value, given):
    """Whether a value has the type of the one in the config, so that it may be taken."""
    if given is None or value is None:
        return True  # may be optional
    if isinstance(given, tuple):
        return isinstance(value, tuple)
    if isinstance(given, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(given)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_with_a_wrong_value_is_one_config_error(name):
    given, config = tuples(plain(CONFIGS[name]())), CONFIGS[name]().copy_and_resolve_references()
    check_config(config)
    taken, count = [], 0
    for path in paths(given):
        before = given
        for key in path:
            before = before[key]
        for value in VALUES:
            count += 1
            with config.unlocked(), config.ignore_type(), put(config, path, value):
                try:
                    check_config(config)
                except ConfigError as error:
                    # Without a release the sections are checked as those of a model.
                    assert f"config.{path[0]}" in str(error) or path == ("release",), error
                    assert len(str(error).splitlines()) == 1
                else:
                    if not is_same_kind(value, before) and not (config.release and path[0] in MODULES):
                        taken.append((".".join(path), value))
    assert count > 500 and not taken


MODULES = ("encoder", "decoder")  # fields of a release's modules are checked when it is opened


@contextlib.contextmanager
def put(config, path, value):
    """The config with another value inside the `with`."""
    for key in path[:-1]:
        config = config[key]
    before = config[path[-1]]
    del config[path[-1]]  # a key that is there keeps the type of its value
    config[path[-1]] = value
    try:
        yield
    finally:
        del config[path[-1]]
        config[path[-1]] = before


@pytest.mark.parametrize("values", [{"encoder.width": 0}, {"decoder.depth": 2**31}, {"optimizer.epsilon": -1.0},
                                    {"connector": 1}, {"stages": "1"}, {"data.variants": 0}])  # fmt: skip
def test_nothing_is_built_before_the_check(monkeypatch, values):
    config = tuples(plain(CONFIGS["base"]()))
    for path, value in values.items():
        config = changed(config, path.split("."), value)
    monkeypatch.setattr("vlm_jax.build.solve_vision", None)
    with pytest.raises(ConfigError, match=f"config.{next(iter(values))}"):
        check_config(ConfigDict(config))
        build(ConfigDict(config))


def test_none_stands_for_what_is_chosen_later():
    from vlm_jax.train import finetuning

    config = finetuning.get_config()
    with config.unlocked():
        config.release, config.data.train_path = "folder", "train.json"
    check_config(config, unset=True)
    with pytest.raises(ConfigError, match=r"config\.data\.held_out: expected int, got None"):
        check_config(config)
    with config.unlocked():
        config.stages.instruction.learning_rates.decoder = -1.0
    with pytest.raises(ConfigError, match=r"learning_rates\.decoder: expected at least 0, got -1\.0"):
        check_config(config, unset=True)


def test_every_section_is_checked():
    assert set(checks.SETTINGS) <= set(build_sections.SECTIONS)
