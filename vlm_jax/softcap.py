"""Logits that stay inside a bound.

Source: Bello et al. 2016, section 5.1 ("logit clipping"); Gemma Team 2024 (Gemma 2), section 2.
"""

import jax
import jax.numpy as jnp


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(logits / softcap); the logits themselves where `softcap` is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def slope(logits: jax.Array, softcap: float | None) -> jax.Array | float:
    """The derivative of `capped`, from its result."""
    return 1.0 if softcap is None else 1 - jnp.square(logits / softcap)
