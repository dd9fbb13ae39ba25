"""A long training process that must stay as it is: `python -m tests.faults.soak --minutes=30`, by `make soak`.

The command of a user fine-tunes a small release from files, with an input process, and logs, saves and evaluates
often. Its resident memory, open file handles and threads, with those of its processes for the input, are read twice a
second, and each is judged by its growth against the steps, after a warm-up of a third of them:

- The steps are divided into `BLOCKS` equal blocks, and a block's value is the least that was read in it: what a save
  or an evaluation holds for a moment, and what the allocator has not yet returned, does not raise the minimum of a
  block.
- A line of least squares goes through the blocks' values. *Growth* is what it rises over a thousand steps, and *noise*
  the half width of its interval at 1 in 2000, one-sided, from what the values deviate from the line.
- It is a leak where growth - noise is above `ALLOWED`, which is what a run of a million steps can afford: a step up,
  as of a pool of threads that makes its last one late, is noise to a line, and a steady rise is not.

After SIGTERM at the end, `metrics.jsonl` must have the line of every step up to the checkpoint that was saved, and
`evaluations.jsonl` that of every evaluation, but for one at the last step, which the next process makes.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

import tests.conftest  # noqa: F401  # sets XLA's flags, which the process inherits
from tests.processes.conftest import ROOT, environment
from tests.processes.watching import processes_of

BLOCKS, WARM_UP = 10, 1 / 3
STUDENT = 5.041  # t of 8 degrees of freedom, one-sided 1 in 2000; one step up in the middle has 5.0
INTERVAL = 0.5  # seconds between two readings
SAVE_EVERY, EVALUATE_EVERY = 20, 50
# What may be added in a thousand steps.
ALLOWED = {"memory": 256e3, "handles": 0.1, "threads": 0.1}
_START_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a process and its descendants have.

    Attributes:
      step: the last step in `metrics.jsonl`.
      memory: resident bytes.
      handles: open files.
      threads: of all of them.
    """

    step: int
    memory: int
    handles: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Trend:
    """How a quantity goes with the steps.

    Attributes:
      first, last: of the first and of the last block.
      growth: by the line, in a thousand steps.
      noise: half width of the interval of the growth.
    """

    first: float
    last: float
    growth: float
    noise: float

    def is_leak(self, allowed: float) -> bool:
        """Whether it grows by more than what is allowed in a thousand steps, whatever the noise."""
        return self.growth - self.noise > allowed


def read(process: subprocess.Popen, step: int) -> Reading:
    """A reading of now; processes that end meanwhile are left out."""
    memory = handles = threads = 0
    for pid in processes_of(process):
        with contextlib.suppress(OSError, KeyError):
            folder = pathlib.Path(f"/proc/{pid}")
            said = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            found = int(said["VmRSS"].split()[0]) * 1024, len(list((folder / "fd").iterdir())), int(said["Threads"])
            memory, handles, threads = memory + found[0], handles + found[1], threads + found[2]
    return Reading(step, memory, handles, threads)


def trend(steps: Sequence[int], values: Sequence[float]) -> Trend:
    """The trend after the warm-up.

    Args:
      steps: of the readings, never falling.
      values: at each.

    Raises:
      ValueError: a block of steps has no reading.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    edges = np.linspace(x[0] + WARM_UP * (x[-1] - x[0]), x[-1], BLOCKS + 1)
    block = np.clip(np.searchsorted(edges, x, side="right") - 1, -1, BLOCKS - 1)
    if missing := set(range(BLOCKS)) - set(block.tolist()):
        raise ValueError(f"expected readings in {BLOCKS} blocks of steps, got none in {len(missing)}; run for longer")
    least = np.array([y[block == number].min() for number in range(BLOCKS)])
    middle = (edges[1:] + edges[:-1]) / 2 - edges.mean()
    slope = middle @ least / (middle @ middle)
    deviation = least - least.mean() - slope * middle
    error = np.sqrt(deviation @ deviation / (BLOCKS - 2) / (middle @ middle))
    return Trend(least[0], least[-1], 1000 * slope, 1000 * STUDENT * error)


def judged(readings: Sequence[Reading]) -> dict[str, Trend]:
    """The trend of each quantity."""
    steps = [one.step for one in readings]
    return {name: trend(steps, [getattr(one, name) for one in readings]) for name in ALLOWED}


def last_step(path: pathlib.Path) -> int:
    """The step of the last whole line of a log; 0 without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def missing_lines(workdir: pathlib.Path) -> list[str]:
    """What the logs of a run lack, or have twice, up to its newest checkpoint."""
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    expected = {"metrics.jsonl": 1, "evaluations.jsonl": EVALUATE_EVERY}
    problems = []
    for name, every in expected.items():
        path = workdir / name
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line)["step"] for line in lines]
        wanted = list(range(every, newest + 1, every))
        if every > 1 and newest % every == 0 and found == wanted[:-1]:
            continue  # stopped by SIGTERM between the checkpoint and its evaluation
        if found != wanted:
            lacking = sorted(set(wanted) - set(found))[:5]
            problems.append(
                f"{name}: expected {len(wanted)} lines up to step {newest}, found {len(found)}; lacks {lacking}"
            )
    return problems


def command(folder: pathlib.Path) -> list[str]:
    """Writes a small release and pictures; returns the command that trains on them without end."""
    from vlm_jax.data.squares import COLOURS, write_squares
    from vlm_jax.pretrained.small import write_small_release

    release, data = write_small_release(folder / "release", words=tuple(COLOURS)), write_squares(folder, 64)
    stage = {"steps": 10**8, "batch_size": 2, "accumulate": 1, "warmup_steps": 10}
    settings: dict[str, object] = {f"stages.instruction.{key}": value for key, value in stage.items()}
    settings |= {f"stages.instruction.learning_rates.{part}": 1e-4 for part in ("connector", "decoder")}
    settings |= {"loop.save_every": SAVE_EVERY, "loop.log_every": 5, "loop.input_workers": 1}
    settings |= {"evaluation.every": EVALUATE_EVERY, "evaluation.max_new_tokens": 4}
    settings |= {
        "data.held_out": 4,
        "data.tasks": ("colour", "place"),
        "encoder.remat": "none",
        "decoder.remat": "none",
    }
    words = [sys.executable, "-m", "vlm_jax.cli.train", f"--release={release}", f"--data={data}"]
    words += [f"--workdir={folder / 'run'}", "--compilation_cache="]
    return [*words, *(f"--config.{key}={value}" for key, value in settings.items())]


def soak(folder: pathlib.Path, seconds: float, more: Sequence[str] = ()) -> tuple[list[Reading], list[str]]:
    """Trains for some seconds after the first steps.

    Args:
      folder: an empty one.
      seconds: of the training.
      more: words of the command.

    Returns:
      The readings, and what the run's logs lack, or how it ended before its time.
    """
    log, readings = folder / "output", list[Reading]()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command(folder), *more], cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = None
            begun = time.monotonic()
            while process.poll() is None and (end is None or time.monotonic() < end):
                step = last_step(folder / "run" / "metrics.jsonl")
                if step > 0:
                    end = time.monotonic() + seconds if end is None else end
                    readings.append(read(process, step))
                elif time.monotonic() - begun > _START_SECONDS:
                    break
                time.sleep(INTERVAL)
            status = process.poll()
            if status is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=_START_SECONDS)
        finally:
            process.kill()
            process.wait()
    if status is not None or not readings or process.returncode != 0:
        said = log.read_text()[-4000:]
        return readings, [f"the run ended with {process.returncode} after step {readings[-1:]}:\n{said}"]
    return readings, missing_lines(folder / "run")


def table(trends: dict[str, Trend]) -> str:
    """The trends for people."""
    lines = [f"{'':8} {'first block':>14} {'last block':>14} {'in 1000 steps':>14} {'noise':>12} {'allowed':>12}"]
    for name, one in trends.items():
        verdict = "LEAK" if one.is_leak(ALLOWED[name]) else "flat"
        lines.append(
            f"{name:8} {one.first:14,.0f} {one.last:14,.0f} {one.growth:14,.2f} {one.noise:12,.2f} "
            f"{ALLOWED[name]:12,.1f} {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, after the first steps")
    parser.add_argument("--readings", type=pathlib.Path, help="a file for all readings, as JSON lines")
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        readings, problems = soak(pathlib.Path(folder), 60 * given.minutes, more)
    if given.readings is not None:
        given.readings.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in readings))
    print("\n".join(problems) or f"{readings[-1].step:,} steps, each with its line")
    if not readings:
        sys.exit(1)
    try:
        trends = judged(readings)
    except ValueError as error:
        sys.exit(str(error))
    print(table(trends))
    sys.exit(bool(problems) or any(one.is_leak(ALLOWED[name]) for name, one in trends.items()))


if __name__ == "__main__":
    main()
