"""Ten seconds of every target, and the faults that the harness finds."""

import importlib

import pytest

from tests.fuzz.run import TARGETS, fuzz
from tests.fuzz.target import made


def test_every_target_is_run():
    assert set(TARGETS) == {
        name for module in set(TARGETS.values()) for name in importlib.import_module(module).TARGETS
    }


@pytest.mark.parametrize("name", TARGETS)
def test_only_documented_errors_leave(name):
    report = fuzz(name, 10.0, limit=30.0)  # by the clock of a machine with other tests; `make fuzz` says 10
    assert report.inputs and not report.findings, "\n".join(map(str, report.findings))


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_is_the_same_whenever_it_is_made(name):
    first, second = (
        [repr(made(importlib.import_module(TARGETS[name]).TARGETS[name], name, 0, index)) for index in (5, 3)]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "KeyError: 'undocumented'"),
        ("hangs", "over 0.5 seconds"),
        ("dies", "the process ended with 3"),
        ("grows", "MB more"),
    ],
)
def test_a_fault_is_found_and_named(name, told):
    seconds = 4.0 if name == "grows" else 0.6  # each start of a process takes longer
    report = fuzz(name, seconds, module="tests.fuzz.toys", limit=0.5 if name == "hangs" else 10.0)
    (finding,) = report.findings
    assert told in finding.told and f"--target={name} --seed=0 --index=" in str(finding)


def test_documented_errors_are_no_fault():
    report = fuzz("sound", 0.5, module="tests.fuzz.toys")
    assert not report.findings and 0 < report.accepted < report.inputs
