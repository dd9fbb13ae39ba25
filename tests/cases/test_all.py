"""Every reported fault has a test whose name begins with its number: `test_07_…`, or `test_09_28_…` for two."""

import ast
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
# Numbers of the reports.
CASES = {
    "inference": (1, 3, 5, 7, 8, 10, 12, 14, 15, 16, 17, 18, 20, 22, 23, 24, 26, 27, 29, 30, 31),
    "training": (1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 15, 17, 18, 20, 21, 22, 25, 26, 27, 28, 30, 32, 33, 36, 39, 45),
}
# Tests of commands as processes of their own.
ELSEWHERE = {"inference": (), "training": (HERE.parent / "processes" / "test_case_commands.py",)}


@pytest.mark.parametrize("kind", CASES)
def test_every_case_has_a_test_and_every_test_names_its_case(kind):
    found, unnamed = set[int](), []
    for path in (*sorted((HERE / kind).glob("test_*.py")), *ELSEWHERE[kind]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                numbers = re.match(r"test_((?:\d\d_)*)", node.name)[1]
                found |= {int(number) for number in numbers.split("_") if number}
                if not numbers:
                    unnamed.append(f"{path.name}: {node.name}")
    assert not unnamed and found == set(CASES[kind])
