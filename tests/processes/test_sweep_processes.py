"""`cli.sweep --processes=2`: its command is stopped, and killed, while points are trained; then it resumes."""

import pathlib
import signal
import subprocess
import sys

from .conftest import ROOT, environment
from .watching import curve, finish, processes_of, rows, steps, wait_for

LABELS = ("pool@1", "random@2")


def start(workdir, *arguments):
    words = [sys.executable, "-m", "vlm_jax.cli.sweep", "--config=tests/processes/ray_sweep.py", "--compilation_cache="]
    return subprocess.Popen(
        [*words, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_that_is_stopped_and_killed_has_the_rows_of_one_process(programs, tmp_path):
    finish(start(tmp_path / "one"))
    workdir = tmp_path / "two"

    def trained():
        """A point in the middle of its steps."""
        return next((label for label in LABELS if 60 <= len(steps(workdir, label)) < 200), None)

    process = start(workdir, "--processes=2")
    label = wait_for(trained, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "rerun the same command to resume" in errors and "Traceback" not in errors
    saved = max(int(path.name) for path in (workdir / "points" / label / "checkpoints").iterdir())
    assert 60 <= saved == len(steps(workdir, label)) < 300  # the last step, and not one of every 50

    process = start(workdir, "--processes=2")
    wait_for((workdir / "points" / label / "point.lock").exists, process)
    workers = processes_of(process)[1:]
    process.kill()
    process.communicate()
    assert len(workers) >= 2
    wait_for(lambda: not any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers))

    finish(start(workdir, "--processes=2"))
    assert rows(workdir) == rows(tmp_path / "one") and len(rows(workdir)) == 2
    for label in LABELS:
        assert curve(steps(workdir, label)) == curve(steps(tmp_path / "one", label))
    assert (workdir / "failed.jsonl").read_text() == ""
