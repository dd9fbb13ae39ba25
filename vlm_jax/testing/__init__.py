"""Contract tests for kinds of a package outside of vlm_jax, as a pytest plugin: `pytest -p vlm_jax.testing`.

The settings of the package's pytest:

    [tool.pytest.ini_options]
    addopts = ["-p", "vlm_jax.testing"]
    vlm_jax_package = "their-package"

and a test file of the package that takes the tests of its tables:

    from vlm_jax.testing.connectors import *
    from vlm_jax.testing.families import *
    from vlm_jax.testing.reducers import *

They run over the kinds that the package registers by its entry points (`vlm_jax.plugins`), so it must be installed. The
plugin gives tests eight CPU devices, strict rank promotion and full-precision products, as those of vlm_jax have. The
tests of families need a fixture `released_config(model_type)` in the package's `conftest.py`: a small released config.
Sizes of required fields that the tests do not know are added to `vlm_jax.testing.kinds.SIZES` there.
"""

import os
from typing import Any

import pytest

DEVICES = "--xla_force_host_platform_device_count=8"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The setting `vlm_jax_package`."""
    parser.addini("vlm_jax_package", "The installed package whose kinds the contract tests run over.")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the devices and the numerics of JAX, and selects the package."""
    package = str(config.getini("vlm_jax_package"))
    if not package:
        raise pytest.UsageError("vlm_jax_package: missing in the settings of pytest; set it to the package's name")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"
    import jax  # after the settings, which it reads when it starts

    from vlm_jax.testing import kinds

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    kinds.select(package)


@pytest.fixture(scope="session")
def mesh() -> Any:
    """Eight devices: two each for data, fsdp and tensor."""
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh

    return make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))


@pytest.fixture
def released_config(model_type: str) -> dict[str, Any]:
    """A small released config of a model type; the package's `conftest.py` has its own."""
    raise pytest.UsageError(
        f"the tests of families need a fixture released_config(model_type) in conftest.py, for '{model_type}'"
    )
