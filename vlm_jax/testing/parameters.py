"""Parameters for tests, drawn in NumPy: compiling `init` takes longer than most tests."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(boxed, seed=1):
    """Values for a boxed tree of shapes, as `jax.eval_shape(init, ..)` gives it; none is 0 throughout.

    Kernels keep the variance of what they read; scales and variances are around 1, other vectors around 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
        values = rng.normal(size=leaf.shape)
        if name in ("scale", "variance"):
            values = 1 + 0.1 * np.abs(values)
        elif name == "kernel":  # a stack of layers and the windows of a convolution are first
            values = values * leaf.shape[-2] ** -0.5 / np.sqrt(np.prod(leaf.shape[:2]) if leaf.ndim == 4 else 1)
        elif leaf.ndim >= 2:
            values = 0.3 * values
        else:
            values = 0.1 * values
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, boxed)
