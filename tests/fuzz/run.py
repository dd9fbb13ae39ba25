"""Fuzzes all targets: `python -m tests.fuzz.run --minutes=60`, or shows one input again.

Every target runs in a process of its own, so that a crash or a hang ends that process alone; inputs are numbered, and
input N of a target and seed is always the same.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import re
import resource
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

from tests.fuzz.target import MAX_SECONDS, Finding, Target, judged, made

# Target -> the module in whose TARGETS it is, which only the processes that read the inputs import.
TARGETS = {
    **dict.fromkeys(("pictures", "videos"), "tests.fuzz.media"),
    **dict.fromkeys(("safetensors", "npz", "index_files", "records"), "tests.fuzz.files"),
    **dict.fromkeys(("templates", "answers", "conversations"), "tests.fuzz.texts"),
    **dict.fromkeys(("configs_by_type", "config_overrides"), "tests.fuzz.configs"),
    **dict.fromkeys(("connectors", "reducers", "encoders"), "tests.fuzz.parts"),
}
ALLOWANCE = 4 << 30  # bytes that a process may have beyond what it has at its start
MAX_FINDINGS = 20  # different ones of a target
START_SECONDS = 300


@dataclasses.dataclass
class Report:
    """What was tried of a target.

    Attributes:
      name: of the target.
      inputs: how many were read or refused.
      accepted: how many were read.
      slowest: seconds of the slowest.
      findings: faults, one of each kind.
    """

    name: str
    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name:18} {self.inputs:9,} inputs, {self.accepted:9,} read, slowest {self.slowest:5.2f} s, "
            f"{len(self.findings)} findings"
        )


def fuzz(name: str, seconds: float, *, seed: int = 0, module: str | None = None, limit: float = MAX_SECONDS) -> Report:
    """Reads inputs of a target for some seconds.

    Args:
      name: of the target.
      seconds: after the processes' start.
      seed: of the inputs.
      module: where the target is, if not in TARGETS.
      limit: seconds after which an input counts as a hang.
    """
    report, kinds, start = Report(name), set[str](), 0
    while seconds > 0 and len(report.findings) < MAX_FINDINGS:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        state = context.RawArray("d", 4)  # index, when it began, seconds of the slowest, number of accepted ones
        process = context.Process(
            target=_work, args=(module or TARGETS[name], name, seed, start, state, theirs), daemon=True
        )
        process.start()
        theirs.close()
        first, told = start, None
        if not ours.poll(START_SECONDS):
            told = "no start"
        began = time.monotonic()
        while told is None and time.monotonic() - began < seconds:
            told = _watched(process, ours, state, limit, report, kinds, seed)
        seconds -= time.monotonic() - began
        process.kill()
        process.join()
        index = int(state[0])
        report.inputs += index - first + bool(told)
        report.accepted += int(state[3])
        report.slowest = max(report.slowest, state[2])
        if told:
            _add(report, kinds, Finding(name, seed, index, told))
        if told in ("", "no start"):
            break
        start = index + 1
    return report


def _watched(
    process: Any, ours: Connection, state: Any, limit: float, report: Report, kinds: set[str], seed: int
) -> str | None:
    """Collects findings for a moment; why the process is to be ended, if it is."""
    try:
        if ours.poll(0.1) and (found := ours.recv()) is not None:
            _add(report, kinds, Finding(report.name, seed, *found))
    except EOFError:
        process.join()
        return "" if process.exitcode == 1 else f"the process ended with {process.exitcode}"  # 1 after a traceback
    began = state[1]  # once: the process sets it to 0 after each input
    if began and time.monotonic() - began > limit:
        return f"over {limit:g} seconds"
    return None


def _add(report: Report, kinds: set[str], finding: Finding) -> None:
    """Adds a finding, unless there is one of the same error at the same place."""
    places = re.findall(r'File ".*?", line \d+', finding.told)
    error = finding.told.strip().splitlines()[-1].split(":")[0]
    kind = f"{places[-1]} {error}" if places else finding.told
    if kind not in kinds:
        kinds.add(kind)
        report.findings.append(finding)


def _work(module: str, name: str, seed: int, start: int, state: Any, theirs: Connection) -> None:
    """Reads inputs until it is killed; an error of the target itself is a finding too."""
    try:
        _read(module, name, seed, start, state, theirs)
    except BaseException:
        theirs.send((int(state[0]), traceback.format_exc()))
        raise


def _read(module: str, name: str, seed: int, start: int, state: Any, theirs: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write there
    warnings.simplefilter("ignore")
    target: Target = importlib.import_module(module).TARGETS[name]
    judged(target, made(target, name, seed, start))  # what is imported or made once
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE, used + ALLOWANCE))
    theirs.send(None)
    index = start
    while True:
        value = made(target, name, seed, index)
        state[0], state[1] = index, time.monotonic()
        accepted, told = judged(target, value)
        state[2], state[1] = max(state[2], time.monotonic() - state[1]), 0.0
        state[3] += accepted
        if told is not None:
            theirs.send((index, told))
        index += 1


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--workers", type=int, default=2, help="targets at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all when missing")
    parser.add_argument("--index", type=int, help="shows this input of the target, and reads it in this process")
    given = parser.parse_args()
    names = given.target or list(TARGETS)
    if given.index is not None:
        target = importlib.import_module(TARGETS[names[0]]).TARGETS[names[0]]
        value = made(target, names[0], given.seed, given.index)
        print(f"{value!r}"[:4000])
        print(target.read(value))
        return
    seconds = given.minutes * 60 * given.workers / len(names)
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        reports = list(pool.map(lambda name: fuzz(name, seconds, seed=given.seed), names))
    findings = [finding for report in reports for finding in report.findings]
    for finding in findings:
        print(f"{finding}\n")
    for report in reports:
        print(report)
    print(f"{sum(report.inputs for report in reports):,} inputs, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
