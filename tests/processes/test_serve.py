"""`python -m vlm_jax.cli.serve` as a process: its port, its end by a signal while it answers, and user errors."""

import http.client
import json
import re
import signal
import subprocess

import pytest

from .alphabet import write
from .conftest import INTERRUPTIBLE, ROOT, environment


@pytest.fixture
def started(tmp_path):
    folder, processes = tmp_path / "endless", []
    folder.mkdir()
    write(folder)
    (folder / "generation_config.json").unlink()

    def start(*arguments):
        words = [*INTERRUPTIBLE, "-m", "vlm_jax.cli.serve", f"--release={folder}"]
        words += ["--port=0", *arguments, "--compilation_cache="]
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)])
def test_it_answers_and_ends_after_its_open_requests(started, kind, status):
    process, told = started("--chunk=1", "--max_length=4000"), []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            break
    assert found, told
    assert any("the model's name is 'endless'" in line for line in told)
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=100)
    message = {"role": "user", "content": "a"}
    body = {"model": "endless", "messages": [message], "max_tokens": 3000, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read(6) == b"data: "
    process.send_signal(kind)
    rest = answer.read().decode()
    connection.close()
    assert rest.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in rest
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == status and "Traceback" not in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_batch=0"], "flag --max_batch=0: expected at least 1, got 0"),
        (["--reducer=fastv"], "ConfigError: config.token_budget: this model has no encoder with a decoder"),
        (["--release=/none"], "CheckpointFileError"),
    ],
)
def test_an_error_of_the_user_is_one_message(started, arguments, message):
    process = started(*arguments)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and message in errors and "Traceback" not in errors, errors
