"""Which runs are made: a sample, as in CI, or all, as `make scale` does."""

import pytest

from tests.processes.conftest import programs as programs

# Tests of CI; the others take half an hour.
SAMPLE = ("test_losses_are_those_of_one_device[deepseek_vl_v2-2-fsdp=2,expert=2]",)


def pytest_addoption(parser):
    parser.addoption("--all-meshes", action="store_true", help="all meshes and systems, and processes that are killed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if not config.getoption("--all-meshes"):
        others = [item for item in items if "tests/scale" in item.nodeid and item.name not in SAMPLE]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
