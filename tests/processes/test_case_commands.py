"""Commands as users type them: `~`, another directory, misspelt configs and values, output to a file, two at once."""

import os
import subprocess
import sys
import time

import pytest

from .conftest import CONFIG, ROOT, environment, wait_for_step

SMOKE = ROOT / "configs" / "finetune.py"


def train(*arguments, cwd=ROOT, **env):
    """(status, standard output, standard error) of `cli.train`."""
    words = [sys.executable, "-m", "vlm_jax.cli.train", "--compilation_cache=", *arguments]
    done = subprocess.run(words, cwd=cwd, env=environment() | env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_09_28_the_home_folder_and_a_config_from_another_directory(tmp_path):
    """`~` in `--workdir` and `--config`; the config's own imports are found without its repository on the path."""
    home, here, packages = tmp_path / "home", tmp_path / "else where", tmp_path / "packages"
    for folder in (home, here, packages):
        folder.mkdir()
    (packages / "vlm_jax").symlink_to(ROOT / "vlm_jax")
    (home / "repository").mkdir()
    (home / "repository" / "configs").symlink_to(ROOT / "configs")
    steps = "--config.stages.instruction.steps=2"
    config = "--config=~/repository/configs/finetune.py:smoke"
    status, _, errors = train(config, "--workdir=~/run", steps, cwd=here, HOME=str(home), PYTHONPATH=str(packages))
    assert status == 0, errors
    assert not list(here.iterdir()) and (home / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("config", "argument", "expected"),
    [
        (f"{ROOT}/configs/nope.py", "", "nope.py"),
        (f"{SMOKE}:smoke", "--config.encoder.width=wide", "--config.encoder.width"),
        (f"{SMOKE}:smoke", "--config.encoder.width=None", "encoder.width"),
        (f"{SMOKE}:smoke", "--config.processor.image_size=48", "config.processor.image_size: expected tuple[int, int]"),
        (f"{SMOKE}:smoke", "--config.connector=1", "connector"),
        (f"{SMOKE}:smoke", "--config.optimizer.epsilon=-1", "config.optimizer.epsilon: expected above 0, got -1"),
        (
            f"{SMOKE}:smoke",
            "--config.processor.image_size=None",
            "config.processor.image_size: expected tuple[int, int]",
        ),
        (f"{SMOKE}:smoke", "--epoch=1", "Unknown command line flag 'epoch'"),
    ],
)
def test_33_a_misspelt_config_or_value_is_one_message(tmp_path, config, argument, expected):
    words = [f"--config={config}", f"--workdir={tmp_path}/run", *([argument] if argument else [])]
    status, _, errors = train(*words)
    assert status == 1 and expected in errors and "Traceback" not in errors, errors
    assert not (tmp_path / "run").exists()


def test_36_39_a_log_file_has_the_loss_before_the_run_ends_and_a_second_run_is_refused(command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    words = [sys.executable, "-m", "vlm_jax.cli.train", f"--config={CONFIG}", f"--workdir={run}"]
    words += ["--compilation_cache=", "--config.stages.answering.steps=5000"]
    with log.open("w") as file:
        first = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_step(run, 20, first)
        deadline = time.monotonic() + 60
        while "answering  loss " not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first.poll() is None and "answering  loss " in log.read_text()
        status, errors = command.finish(run, "--config.stages.answering.steps=5000")
        assert status == 1 and f"is in use by process {first.pid} on " in errors and "Traceback" not in errors
        assert first.poll() is None
    finally:
        os.kill(first.pid, 9)
        first.wait()


def test_26_a_key_that_the_config_leaves_out_can_be_given(tmp_path):
    """One that the data has is taken, so that the data is read; one that it has not is named."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom configs import finetune\n\ndef get_config():\n"
        "    config = finetune.get_config('smoke').unlock()\n"
        "    config.data = ConfigDict({'kind': 'conversations', 'channels': 1, 'train_path': 'nowhere.jsonl',\n"
        "                              'evaluation_path': 'none.jsonl'})\n    return config.lock()\n"
    )
    for key, expected in (("max_corrupt", "there is no file"), ("max_corupt", "did you mean 'max_corrupt'?")):
        status, _, errors = train(f"--config={path}", f"--workdir={tmp_path}/run", f"--config.data.{key}=5")
        assert status == 1 and expected in errors and "Traceback" not in errors, errors
