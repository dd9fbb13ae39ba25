"""What messages on flags advise works: flags that do not fit, the message, and what the command then does."""

import functools
import importlib
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from PIL import Image

import vlm_jax
from tests.contracts import releases
from tests.train.conftest import tiny_config
from tests.train.test_config_release import config_of
from vlm_jax.build import build
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.orbax import CHECKPOINTS, RunCheckpoints
from vlm_jax.cli import command
from vlm_jax.config import ConfigError
from vlm_jax.generation.text import Completion
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.train.state import TrainState

from ..advice import tried
from ..processes.alphabet import write


@functools.cache
def command_of(name):
    """A command's module, and its flags' defaults; they are not registered, since commands share names of flags."""
    registered = flags.FLAGS._flags()
    held = dict(registered)
    registered.clear()
    try:
        module = importlib.import_module(f"vlm_jax.cli.{name}")
        holders = {key: value for key, value in vars(module).items() if isinstance(value, flags.FlagHolder)}
        return module, {key: holder.default for key, holder in holders.items()}
    finally:
        registered.clear()
        registered.update(held)


@pytest.fixture
def given(monkeypatch):
    """Sets flags of a module, by the names of its constants, without the setup of a process."""

    def sets(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, SimpleNamespace(value=value))
        for name in ("keep_programs", "quieten", "show_flags"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda: None)

    return sets


@pytest.fixture
def opened(given):
    """The module of a command, whose flags have their defaults."""

    def opens(name):
        module, defaults = command_of(name)
        given(module, **defaults)
        return module

    return opens


def test_a_conversion_has_a_target_or_is_a_dry_run(given, opened, tmp_path, capsys):
    convert = opened("convert")
    (tmp_path / "released").mkdir()
    write(tmp_path / "released")
    told = tried("--target: expected a folder to write; pass one, or --dry-run")
    given(convert, SOURCE=tmp_path / "released")
    with pytest.raises(app.UsageError, match=told):
        convert.main(["convert"])
    keys = list(open_checkpoint(tmp_path / "released"))
    given(convert, DRY_RUN=True)
    convert.main(["convert"])
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == keys
    given(convert, DRY_RUN=False, TARGET=tmp_path / "orbax")
    convert.main(["convert"])
    params = [vlm_jax.from_pretrained(tmp_path / side).params for side in ("released", "orbax")]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_boxes_are_drawn_into_a_folder(given, opened, tmp_path, monkeypatch):
    generate = opened("generate")
    (tmp_path / "release").mkdir()
    releases.make("llava", tmp_path / "release")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Pretrained, "generate", lambda *_, **__: Completion("", (257,), "end"))
    drawn = tmp_path / "drawn" / "a.png"
    given(generate, CHECKPOINT=tmp_path / "release", PROMPT="where?", IMAGE=[str(tmp_path / "a.png")], DRAW=str(drawn))
    with pytest.raises(app.UsageError, match=tried("there is no folder {}; create it, or name another file")):
        generate.main(["generate"])
    drawn.parent.mkdir()
    for file in (drawn, tmp_path / "another.png"):
        given(generate, DRAW=str(file))
        generate.main(["generate"])
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), pixels)  # an answer without boxes


class Loaded(Exception):
    """The weights of a release would be read."""


@pytest.fixture
def unread(monkeypatch):
    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(vlm_jax, "from_pretrained", load)


@pytest.mark.parametrize(("flag", "value"), [("no_repeat_window", 90), ("no_repeat_except", ["<td>"])])
def test_flags_of_repeated_ngrams_need_their_size_before_weights_are_read(given, opened, unread, flag, value):
    generate = opened("generate")
    told = tried("--{}: only with --no_repeat_ngram_size; add it, or omit the flag")
    for size in (None, 0):
        given(generate, CHECKPOINT="release", PROMPT="d", NO_REPEAT_NGRAM_SIZE=size, **{flag.upper(): value})
        with pytest.raises(app.UsageError, match=told) as error:
            generate.main(["generate"])
        assert str(error.value).startswith(f"--{flag}: ")
    given(generate, NO_REPEAT_NGRAM_SIZE=30)
    with pytest.raises(Loaded):
        generate.main(["generate"])
    given(generate, **{"NO_REPEAT_NGRAM_SIZE": None, flag.upper(): None})
    with pytest.raises(Loaded):
        generate.main(["generate"])


def test_batches_of_a_server_are_counted_before_weights_are_read(given, opened, unread, capsys):
    serve = opened("serve")
    given(serve, RELEASE="release", MESH="tensor:4", NUM_BATCHES=2)
    with pytest.raises(SystemExit):
        serve.main(["serve"])
    assert "--num_batches: expected 1 on the 8 devices of --mesh, got 2" in capsys.readouterr().err
    given(serve, NUM_BATCHES=1)
    with pytest.raises(Loaded):
        serve.main(["serve"])


def test_only_a_release_with_its_own_parts_is_exported(given, opened, tmp_path, monkeypatch):
    train = opened("train")
    told = tried("--export: a run without config.release has no released format; omit the flag")
    experiment = build(tiny_config())
    given(train, EXPORT=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=told):
        train.check_export(experiment)
    (tmp_path / "release").mkdir()
    releases.make("llava", tmp_path / "release")
    other = build(config_of(tmp_path / "release", connector={"kind": "pool"}, token_budget=4))
    with pytest.raises(
        ConfigError, match=tried("--export: the release has no names for another {connector}; omit the flag")
    ):
        train.check_export(other)
    whole = build(config_of(tmp_path / "release"))
    train.check_export(whole)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = tried("--export: of several processes none has all parameters; use cli.convert --run afterwards")
    with pytest.raises(ConfigError, match=told):
        train.check_export(whole)
    monkeypatch.undo()
    params = jax.tree.map(lambda x: x + 1, vlm_jax.from_pretrained(tmp_path / "release").params)
    checkpoints = RunCheckpoints(tmp_path / "run" / CHECKPOINTS, 1)
    checkpoints.save(2, TrainState(jnp.zeros((), jnp.int32), params, None), {"position": 0})
    checkpoints.close()
    convert = opened("convert")
    given(convert, SOURCE=tmp_path / "release", TARGET=tmp_path / "out", RUN=tmp_path / "run")
    convert.main(["convert"])
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(tmp_path / "out").params, params)
    given(train, EXPORT=None)
    for one in (experiment, other):
        assert train.check_export(one) is None


def test_a_flag_of_a_key_that_the_config_lacks_is_omitted(given, opened, monkeypatch):
    train = opened("train")
    monkeypatch.setattr(command, "config_path", lambda: "own.py")
    given(command, CONFIG=tiny_config())
    given(train, RELEASE=None, DATA="train.json", EVALUATION_DATA=None, EPOCHS=None)
    told = tried("config.{data.train_path}: the config has no such key; omit --{data}")
    with pytest.raises(ConfigError, match=told):
        train.configured()
    given(train, DATA=None)
    config, chosen = train.configured()
    assert config.data == tiny_config().data and chosen == {}


def test_a_command_is_rerun_when_there_is_space(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main(["train"]))
    monkeypatch.setattr(command.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train", "--config=own.py"])
    given(command, CONFIG=tiny_config(), WORKDIR=str(tmp_path), LIST_KEYS=False, DISTRIBUTED=False)
    written = tmp_path / "metrics.jsonl"
    written.symlink_to("/dev/full")
    with pytest.raises(SystemExit) as caught:
        command.run(lambda: written.write_text("{}\n"))
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and line.startswith("[Errno 28] No space left on device")
    assert re.search(tried("free space on {}, and rerun the same command to resume"), line)
    written.unlink()
    command.run(lambda: written.write_text("{}\n"))
    assert capsys.readouterr().err == "" and written.read_text() == "{}\n"


def test_a_server_needs_its_libraries(opened, monkeypatch):
    serve = opened("serve")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)
        told = tried("cli.serve: {uvicorn} is not installed: pip install 'vlm_jax[serve]'")
        with pytest.raises(ConfigError, match=told):
            serve.libraries()
    assert callable(serve.libraries()[1].make_app)


def test_a_page_needs_its_libraries(opened, monkeypatch):
    """With them, tests/processes/test_demo.py opens it."""
    demo = opened("demo")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    told = tried("cli.demo: {uvicorn} is not installed: pip install 'vlm_jax[demo]'")
    with pytest.raises(ConfigError, match=told):
        demo.libraries()


@pytest.mark.parametrize("word", ["1280", "0x3", "-1x3", "3x", "9999999x3", "axb"])
def test_a_size_is_two_sides(word):
    tokens, _ = command_of("tokens")
    with pytest.raises(app.UsageError, match=f"--sizes: expected WIDTHxHEIGHT in pixels, .*, got '{word}'"):
        tokens.parse_sizes(["32x16", word])
    assert tokens.parse_sizes(["1280x720", " 4x8"]) == [(720, 1280), (8, 4)]
