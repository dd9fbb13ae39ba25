"""What `make soak` judges by: a process that leaks and one that does not."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.faults import soak

# Waits for lines; at each it keeps a file open, a thread and two megabytes, or none of them.
CHILD = """
import sys, threading
kept, event = [], threading.Event()
print("started", flush=True)
for line in sys.stdin:
    if KEEPS:
        thread = threading.Thread(target=event.wait, daemon=True)
        thread.start()
        kept.append((open("/dev/null"), thread, bytearray(b"x" * 2**21)))
    print("done", flush=True)
"""


def readings(keeps: bool, count: int = 31) -> list[soak.Reading]:
    code = textwrap.dedent(CHILD).replace("KEEPS", str(keeps))
    words = [sys.executable, "-c", code]
    found = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "started\n"
        for step in range(count):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            found.append(soak.read(process, step))
        process.stdin.close()
    return found


def test_what_a_process_keeps_is_told_and_measured():
    found = soak.judged(readings(keeps=True))
    assert all(one.is_leak(soak.ALLOWED[name]) for name, one in found.items())
    assert found["handles"].growth == found["threads"].growth == pytest.approx(1000)
    assert found["memory"].growth == pytest.approx(1000 * 2**21, rel=0.05)


def test_a_process_that_keeps_nothing_is_flat():
    found = soak.judged(readings(keeps=False))
    assert not any(one.is_leak(soak.ALLOWED[name]) for name, one in found.items())
    assert found["handles"].growth == found["threads"].growth == 0


def test_noise_is_no_leak_and_a_small_leak_in_noise_is():
    """A run of 20,000 steps: 600 MB with noise of 4 MB above the least, as of saves; then 512 bytes kept at each."""
    steps = np.arange(0, 20_000, 5)
    told = {0: 0, 512: 0}
    for seed in range(200):
        noise = np.random.default_rng(seed).exponential(4e6, steps.size)
        for kept in told:
            found = soak.trend(steps, 600e6 + noise + kept * steps)
            told[kept] += found.is_leak(soak.ALLOWED["memory"])
            assert abs(found.growth - 1000 * kept) <= found.noise * 2
    assert told == {0: 0, 512: 200}


def test_one_thread_that_is_made_late_is_no_leak_and_one_every_thousand_steps_is():
    steps = np.arange(0, 9_001, 5)
    short = np.arange(0, 1501, 5)  # in which one thread weighs more
    for of, begins in ((steps, range(3000, 9000, 300)), (short, range(500, 1500, 50))):  # first block to last
        for begin in begins:
            assert not soak.trend(of, np.where(of > begin, 41, 40)).is_leak(soak.ALLOWED["threads"]), begin
    assert soak.trend(steps, 40 + steps // 1000).is_leak(soak.ALLOWED["threads"])


def test_too_few_readings_are_refused():
    with pytest.raises(ValueError, match="expected readings in 10 blocks of steps, got none in 6; run for longer"):
        soak.trend([0, 10, 20, 30, 40, 50], [1.0] * 6)


def test_a_step_without_its_line_is_named(tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    lines = [f'{{"step": {step}}}\n' for step in range(1, 101)]
    (tmp_path / "evaluations.jsonl").write_text(lines[49] + lines[99])
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert soak.missing_lines(tmp_path) == [] and soak.last_step(tmp_path / "metrics.jsonl") == 100
    (tmp_path / "evaluations.jsonl").write_text(lines[49])
    assert soak.missing_lines(tmp_path) == []  # the run was stopped before the evaluation of step 100
    (tmp_path / "evaluations.jsonl").write_text(lines[99])
    (told,) = soak.missing_lines(tmp_path)
    assert told == "evaluations.jsonl: expected 2 lines up to step 100, found 1; lacks [50]"
    (tmp_path / "evaluations.jsonl").write_text(lines[49] + lines[99])
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert soak.missing_lines(tmp_path) == ["metrics.jsonl: expected 100 lines up to step 100, found 99; lacks [100]"]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:41] + lines[42:]))
    (told,) = soak.missing_lines(tmp_path)
    assert told == "metrics.jsonl: expected 100 lines up to step 100, found 99; lacks [42]"
