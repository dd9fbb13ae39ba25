"""Config files that fail, and overrides in sections that a config does not have."""

import re
import subprocess
import sys

import pytest
from absl import flags

from vlm_jax.cli.command import _Unlocking

from ..advice import tried

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections

FILE = """
import ml_collections

def get_config(failing=""):
    config = ml_collections.ConfigDict({"encoder": {"width": 4}, "stages": {"encodr": {"steps": 1}}, "places": (1, 2)})
    config.update({"schedule": (), "names": ["a"]})
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
    with pytest.raises(flags.Error, match=rf"^/.*/own\.py:8: {told}") as caught:
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


@pytest.mark.parametrize(
    ("word", "held"),
    [
        ("--config.places[1]=3", r"config\.places holds \(1, 2\), of which no item \[1\]"),
        ("--config.schedule[0]=x", r"config\.schedule holds \(\), of which no item \[0\]"),
        ("--config.names[2]=x", r"config\.names holds \['a'\], of which no item \[2\]"),
        ("--config.places[x]=3", r"of which no item \[x\]"),
        ("--config.encoder.width[0]=3", r"config\.encoder\.width holds 4, of which no item \[0\]"),
        ("--config.places[0].more=3", r"config\.places holds \(1, 2\), of which no item \[0\]"),
    ],
)
def test_an_item_that_cannot_be_set_is_named_with_what_is_held(tmp_path, monkeypatch, word, held):
    told = tried("can be set; set the whole value, such as {}=\"('a', 'b')\" for a tuple of texts")
    with pytest.raises(flags.Error, match=f"{held} {told}"):
        parse(tmp_path, monkeypatch, "", word)


def test_a_tuple_is_set_as_the_message_says(tmp_path):
    """In a process of its own, whose flags are parsed once."""
    path = tmp_path / "own.py"
    path.write_text(FILE)
    code = "from vlm_jax.cli import command; command.run(lambda: print(command.workdir(), command.CONFIG.value))"
    words = [sys.executable, "-W", "ignore", "-c", code, f"--config={path}"]

    def run(word, *more):
        return subprocess.run([*words, word, *more], capture_output=True, text=True)

    refused = run("--config.schedule[0]=x")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("ConfigError: --config.schedule[0]=x: config.schedule holds ()")
    assert "schedule: !!python/tuple\n- a\n- b\n" in run("--config.schedule=('a', 'b')", "--workdir=/run").stdout
    lacks = run("--config.encoder.width=5")
    told = tried("--workdir: expected the folder of the run; pass one")
    assert lacks.returncode == 1 and re.search(told, lacks.stdout + lacks.stderr)
    assert run("--config.encoder.width=5", "--workdir=/run").stdout.startswith("/run ")
    assert re.search(tried("ConfigError: {}\nPass --help for the flags"), refused.stderr)
    assert "--config.KEY=VALUE overrides a key" in re.sub(r"\s+", " ", run("--help").stdout)


def test_keys_may_be_new_and_items_of_lists_have_indices(tmp_path, monkeypatch):
    words = ("--config.encoder.depth=3", "--config.names[0]=b", "--config.encoder=3")
    assert not parse(tmp_path, monkeypatch, "", *words).is_locked
