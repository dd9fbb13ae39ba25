"""The benchmark of generation in small, as a process: every row, and the tokens of the reference's own loop."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = [(2, 32)]  # batch, tokens of the prompt
DEPTHS = [(2, 1), (2, 2)]  # batch, layers


def test_it_prints_every_row_with_the_same_tokens(tmp_path):
    command = [sys.executable, "experiments/generation_speed/benchmark.py", "--tiny", "--rounds=1", "--new-tokens=5"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--cores={cores}", f"--out={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "speed.png").stat().st_size > 0

    rows = json.loads((tmp_path / "rows.json").read_text())
    generated = [row for row in rows if "prompt" in row]
    assert [(row["batch"], row["prompt"], row["new_tokens"], row["same"]) for row in generated] == [
        (*case, 5, 1.0) for case in CASES
    ]
    names = {"ours", "theirs", "XLA's products", "PyTorch's products", "reading"}
    assert all(set(row["seconds"]) == names for row in generated)
    assert all(len(times) == 1 for row in generated for of in row["seconds"].values() for times in of.values())
    compiled = [row for row in rows if "depth" in row]
    assert [(row["batch"], row["depth"]) for row in compiled] == DEPTHS

    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for phase in (cells[2:3], cells[5:6]):
        assert [(cell[0], cell[1], cell[-1]) for cell in phase] == [(str(b), str(t), "100%") for b, t in CASES]
    assert [(cell[0], cell[1]) for cell in cells[8:]] == [(str(b), str(depth)) for b, depth in DEPTHS]
