"""What the command line says to a bad config: one message, status 1, nothing written."""

import pytest


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "--config.token_bugdet=4",
            "--config.token_bugdet=4: the config has no such key; did you mean 'token_budget'?",
        ),
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
