"""SIGTERM and SIGKILL, sent to a real process at any time."""

import json
import os
import re
import signal

from tests.processes.conftest import ROOT, wait_for_step

from ..advice import tried


def curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["stage"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_that_was_terminated_and_killed_gives_the_same_curve(command, tmp_path):
    status, errors = command.finish(os.path.relpath(tmp_path / "whole", ROOT))  # a relative folder serves too
    assert status == 0, errors
    whole = curve(tmp_path / "whole")
    assert [step for step, *_ in whole] == list(range(1, 81))

    broken = tmp_path / "broken"
    process = command.start(broken)
    wait_for_step(broken, 5, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM and saved at step" in errors
    assert re.search(tried("{}; rerun the same command to resume"), errors)
    stopped_at = curve(broken)[-1][0]
    assert 5 <= stopped_at < 80
    assert (broken / "checkpoints" / str(stopped_at)).is_dir()

    process = command.start(broken)
    wait_for_step(broken, min(stopped_at + 25, 79), process)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len(curve(broken)) < 80 or not (broken / "evaluation.json").exists()

    status, errors = command.finish(broken)
    assert status == 0, errors
    assert curve(broken) == whole
    for name in ("evaluation.json", "evaluations.jsonl", *(f"evaluations/{step}.jsonl" for step in (30, 60, 80))):
        assert (broken / name).read_text() == (tmp_path / "whole" / name).read_text(), name
