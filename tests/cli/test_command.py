"""Config files that fail, and overrides in sections that a config does not have."""

import sys

import pytest
from absl import flags

from vlm_jax.cli.command import _Unlocking

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections

FILE = """
import ml_collections

def get_config(failing=""):
    config = ml_collections.ConfigDict({"encoder": {"width": 4}, "stages": {"encodr": {"steps": 1}}, "places": (1, 2)})
    if failing:
        eval(failing, {"config": config, "none": {}})
    return config
"""
FAILING = {
    "config.encodr.width": "AttributeError: .*encodr",
    "none['encoder']": "KeyError: 'encoder'",
    "int('a')": "ValueError: invalid literal",
    "int([])": "TypeError: int",
    "1 / 0": "ZeroDivisionError: division by zero",
    "b'\\xff'.decode()": "UnicodeDecodeError: 'utf-8'",
}


def parse(tmp_path, monkeypatch, failing, *words):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    monkeypatch.setattr(sys, "argv", ["train", f"--config={path}", *words])
    return _Unlocking(name="config", lock_config=False).parse(f"{path}:{failing}" if failing else str(path))


@pytest.mark.parametrize(("failing", "told"), FAILING.items())
def test_an_error_of_the_file_has_its_line_and_no_override(tmp_path, monkeypatch, failing, told):
    with pytest.raises(flags.Error, match=rf"^/.*/own\.py:7: {told}") as caught:
        parse(tmp_path, monkeypatch, failing, "--config.encoder.width=3")
    assert "--config." not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_file_that_is_no_python_is_named(tmp_path, monkeypatch):
    path = tmp_path / "own.py"
    path.write_text("def get_config(:\n")
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(flags.Error, match=r"own\.py: SyntaxError: .*line 1"):
        _Unlocking(name="config", lock_config=False).parse(str(path))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--config.encodr.width=3", "the config has no such section; did you mean 'encoder'?"),  # a name elsewhere
        ("--config.encoder.deeper.width=3", "the config has no such section; known here: width"),
        ("--config.encoder.width.more=3", "the config has no such section"),
    ],
)
def test_only_the_override_without_a_section_is_named(tmp_path, monkeypatch, word, told):
    others = ("--config.encoder.width=3", "--config.stages.encodr.steps=2", "--config.stages.encodr.more=2")
    with pytest.raises(flags.Error) as caught:
        parse(tmp_path, monkeypatch, "", *others, word)
    assert str(caught.value) == f"{word}: {told}"


def test_keys_may_be_new_and_items_of_tuples_have_indices(tmp_path, monkeypatch):
    words = ("--config.encoder.depth=3", "--config.places[1]=3", "--config.encoder=3")
    assert not parse(tmp_path, monkeypatch, "", *words).is_locked
