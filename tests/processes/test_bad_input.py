"""What the command line says to a bad config: one message, status 1, nothing written."""

import subprocess
import sys

import pytest

from .conftest import ROOT, environment


def test_a_config_file_that_fails_is_one_message(tmp_path):
    words = [sys.executable, "-m", "vlm_jax.cli.train", "--config=configs/finetune.py:smokee", f"--workdir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ValueError: this config takes smoke, not 'smokee'" in done.stderr


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "--config.token_bugdet=4",
            "config.token_bugdet: unknown or unused key; did you mean 'token_budget'?",
        ),
        ("--config.encodr.width=4", "--config.encodr.width=4: the config has no such section; did you mean 'encoder'?"),
        ("--config.data.max_corrupt=4", "config.data.max_corrupt: unknown or unused key"),  # not of digits
        ("--config.token_budget=3", "pool cannot give 3 tokens from a 4x4 grid"),
        ("--config.encoder.kind=vitt", "config.encoder.kind: no kind 'vitt'; did you mean 'vit'?"),
    ],
)
def test_one_clear_message_and_nothing_written(command, tmp_path, argument, expected):
    status, errors = command.finish(tmp_path / "run", argument)
    assert status == 1
    assert expected in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
