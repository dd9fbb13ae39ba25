"""`python -m vlm_jax.cli.evaluate` as a process: its flags, its exit status and what it says."""

import json
import subprocess
import sys

import pytest

from tests.sweep.releases import write_questions, write_release

from .conftest import ROOT, environment


@pytest.fixture
def said(tmp_path):
    write_release(tmp_path / "release")
    write_questions(tmp_path / "questions.jsonl", [["a"], ["b"]])

    def run(*arguments):
        """Exit status and standard error."""
        words = [sys.executable, "-m", "vlm_jax.cli.evaluate", f"--release={tmp_path / 'release'}"]
        words += [f"--data={tmp_path / 'questions.jsonl'}", f"--workdir={tmp_path / 'work'}"]
        words += ["--max_new_tokens=2", "--batch_size=1", "--compilation_cache=", *arguments]
        process = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        return process.returncode, process.stderr

    return run


def test_a_failed_point_is_named_and_the_same_command_tries_it_again(said, tmp_path):
    picture = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(picture[:50])
    status, errors = said("--budgets=x")
    assert status == 1 and "ConfigError: --budgets: expected integers, got 'x'" in errors
    status, errors = said("--reducers=none", "--num_samples=2", "--tasks=vqa,locate")
    path = tmp_path / "work" / "failed.jsonl"
    assert status == 1 and "1 of 1 points failed: none@released; see" in errors, errors
    assert json.loads(path.read_text())["error"].startswith("TooManyCorruptImages")
    (tmp_path / "0.png").write_bytes(picture)
    status, errors = said("--reducers=none", "--num_samples=2", "--tasks=vqa,locate")
    assert (status, path.read_text()) == (0, ""), errors
    assert (tmp_path / "work" / "report.html").exists()
