from pathlib import Path

import pytest

from tests.golden import comparison

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser):
    parser.addoption(
        "--golden-root",
        action="append",
        metavar="DIR",
        type=Path,
        help="compare every folder with a golden.json below DIR, tests/golden/data unless told; repeatable",
    )


def pytest_generate_tests(metafunc):
    if "golden_folder" not in metafunc.fixturenames:
        return
    # The option is known where pytest starts in this folder; a run of all tests takes the default.
    folders, ids = [], []
    for root in metafunc.config.getoption("--golden-root", default=None) or [DATA]:
        try:
            found = comparison.find(root)
        except FileNotFoundError as error:
            raise pytest.UsageError(f"--golden-root: {error}") from error
        folders += found
        ids += [str(folder.relative_to(root)) if folder != root else folder.name for folder in found]
    metafunc.parametrize("golden_folder", folders, ids=ids)
