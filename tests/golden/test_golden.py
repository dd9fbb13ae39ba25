"""Every golden folder, through the module that is registered for its system."""

import re

import pytest

from tests.golden import comparison
from tests.golden.conftest import DATA
from tests.golden.systems import SYSTEMS


def test_outputs_are_those_of_the_official_code(golden_folder):
    lines = comparison.failures(comparison.read(golden_folder), SYSTEMS)
    if lines:
        pytest.fail(f"{golden_folder}: {len(lines)} outputs do not hold:\n  " + "\n  ".join(lines), pytrace=False)


def test_every_registered_system_has_a_folder():
    assert set(SYSTEMS) == {comparison.read(folder).system for folder in comparison.find(DATA)}


def test_every_excuse_is_used():
    names: dict[str, set[str]] = {}
    for golden in map(comparison.read, comparison.find(DATA)):
        module = SYSTEMS[golden.system]
        names.setdefault(module.__name__, set()).update(golden.expected)
    unused = [
        f"{module.__name__}.NOT_COMPARED['{pattern}']"
        for module in SYSTEMS.values()
        for pattern in getattr(module, "NOT_COMPARED", {})
        if not any(re.fullmatch(pattern, name) for name in names.get(module.__name__, ()))
    ]
    assert not unused
