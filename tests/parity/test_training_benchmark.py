"""The benchmark of training steps in small, as a process: every contender, with the losses of the reference's loop."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_contender_has_the_losses_of_the_reference(tmp_path):
    command = [sys.executable, "experiments/train_speed/benchmark.py", "--tiny", "--rounds=2"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--cores={cores}", f"--out={tmp_path / 'out.json'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    losses = {name: [step[0] for step in steps] for name, steps in found["steps"].items()}
    assert set(losses) == {"ours", "ours, remat none", "ours, remat full", "transformers"}
    for name in losses:
        np.testing.assert_allclose(losses[name], losses["transformers"], atol=5e-5, err_msg=name)
    assert losses["ours"][0] - losses["ours"][2] > 1e-3
    steps = found["packed"][0][1]
    assert steps["packed"] < steps["padded"] == 8
    assert all(
        name in done.stdout for name in (*losses, "of mixed sizes", "products alone", "With twice the vocabulary")
    )
