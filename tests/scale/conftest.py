"""Which runs are made: a sample of few steps, as in CI, or all, as `make scale` does."""

import pytest

from tests.processes.conftest import programs as programs

# A system each; along the axes of the first one both processes have the same rows.
SAMPLE = ("qwen2_5_vl-2-tensor=2,context=2", "deepseek_vl_v2-2-fsdp=2,expert=2")


def pytest_addoption(parser):
    parser.addoption("--all-meshes", action="store_true", help="all meshes, 20 steps, and processes that are killed")


@pytest.fixture(scope="session")
def steps(request):
    return 20 if request.config.getoption("--all-meshes") else 6


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if not config.getoption("--all-meshes"):
        chosen = tuple(f"[{name}]" for name in SAMPLE)
        others = [item for item in items if "tests/scale" in item.nodeid and not item.name.endswith(chosen)]
        here = [item.name for item in items if "tests/scale" in item.nodeid]
        lacking = [name for name in chosen if here and not any(one.endswith(name) for one in here)]
        if lacking and not any("::" in word for word in config.args):  # all tests of the file are collected
            raise pytest.UsageError(f"SAMPLE in tests/scale/conftest.py: no test is called {', '.join(lacking)}")
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
