"""What a command line says: `~`, keys of the data, misspelt arguments; and what a log file gets."""

import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import finetune
from vlm_jax import data
from vlm_jax.build import build
from vlm_jax.cli.progress import Lines, open_progress
from vlm_jax.config import ConfigError
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train import finetuning
from vlm_jax.train.check import check_config
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

from ...advice import messages
from .files import config_of, records, write


def test_09_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    config, mesh = config_of(folder), make_mesh(MeshSettings(data=1), jax.devices()[:1])
    trainer = Trainer(config, build(config), mesh, "~/run")
    assert str(trainer.workdir) == str(tmp_path / "home" / "run") and not list((tmp_path / "here").iterdir())


def all_rows(config: ConfigDict) -> None:
    """Makes every training row of an epoch."""
    stage = parse_schedule(config.schedule, config.stages)[0].stage
    made = rows(build(config), stage, config.seed)
    for index in range(8):
        _ = made[index]


def test_26_keys_of_the_data_that_errors_name_can_be_given(folder, tmp_path):
    """In the configs of fine-tuning, and the named key helps."""
    files = {f"data/{path.name}" for path in pathlib.Path(data.__path__[0]).glob("*.py")}
    files -= {f"data/{name}.py" for name in ("digits", "pages", "documents", "document_pages", "glyphs")}
    named = {key for file, text in messages() if file in files for key in re.findall(r"config\.data\.([a-z_]+)", text)}
    assert {"max_corrupt", "held_out", "tasks", "columns"} <= named
    for config in (finetune.get_config(), finetuning.get_config()):
        assert named <= set(config.data)
    asked = [{**row, "image": f"{folder}/{row['image']}"} for row in records(8)]
    asked[3]["image"] = f"{folder}/missing.png"
    changes = {"data__train_path": write(tmp_path / "train.jsonl", asked)}
    with pytest.raises(
        TooManyCorruptImages, match=r"config\.data\.max_corrupt=0:\n.*missing\.png.*\n.*raise the limit"
    ):
        all_rows(config_of(folder, **changes))
    all_rows(config_of(folder, **changes, data__max_corrupt=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__width": "wide"}, r"config\.encoder\.width: expected int, got 'wide'"),
        ({"encoder__width": None}, r"config\.encoder\.width: expected int, got None"),
        ({"processor__image_size": 48}, r"config\.processor\.image_size: expected tuple\[int, int\] .*got 48"),
        ({"processor__image_size": None}, r"config\.processor\.image_size: expected \(height, width\) .*got None"),
    ],
)
def test_33_a_value_of_another_type_is_one_message(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        config = config_of(folder, **changes)
        check_config(config)
        build(config)


def test_33_a_misspelt_argument_of_a_config_is_named():
    with pytest.raises(ValueError, match="this config takes smoke, not 'smokee'"):
        finetune.get_config("smokee")


def test_39_a_file_gets_the_loss_before_the_run_ends(folder, tmp_path, capsys):
    config, mesh, seen = config_of(folder), make_mesh(MeshSettings(data=1), jax.devices()[:1]), []
    with open_progress() as shown:
        assert isinstance(shown, Lines)

        def progress(step, steps, line):
            shown(step, steps, line)
            seen.append(capsys.readouterr().out)

        Trainer(config, build(config), mesh, tmp_path / "run", progress=progress).run()
    assert len(seen) == 4 and all("tuning  loss " in text for text in seen)
