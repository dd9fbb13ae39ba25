"""SigLIP from scratch by the command of `configs/siglip_digits.py`: captions find their pages, and the reverse."""

import json
import os
import subprocess
import sys

from .conftest import ROOT


def test_four_of_five_unseen_pairs_are_found_first(tmp_path):
    command = [sys.executable, "-m", "vlm_jax.cli.train", "--config=configs/siglip_digits.py", f"--workdir={tmp_path}"]
    own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # optimised programs: the steps take most of the time
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())["accuracy"]
    for name in ("image_to_text/recall@1", "text_to_image/recall@1"):
        assert found[name]["n"] == 100 and found[name]["mean"] >= 0.8, (name, found[name])
