"""The interface of `vlm_jax.connectors`, for every entry of the table."""

from vlm_jax import connectors
from vlm_jax.connectors import CONNECTORS
from vlm_jax.testing.connectors import *  # noqa: F403

from .kinds import defined


def test_every_connector_of_the_folder_is_in_the_table():
    missing = [cls.__name__ for cls in defined(connectors, "for_budget") if cls not in CONNECTORS.values()]
    assert not missing, f"add {missing} to CONNECTORS in vlm_jax/connectors/__init__.py"
