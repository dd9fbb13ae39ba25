"""The contract tests of vlm_jax, for the kinds of this package."""

from vlm_jax.testing.connectors import *  # noqa: F403
from vlm_jax.testing.families import *  # noqa: F403
from vlm_jax.testing.reducers import *  # noqa: F403
