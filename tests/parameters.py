"""Parameters for tests, drawn in NumPy: compiling `init` takes longer than most tests."""

from vlm_jax.testing.parameters import drawn as drawn
