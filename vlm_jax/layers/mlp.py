"""Feed-forward blocks: plain (two linear layers) and gated (SwiGLU and similar)."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import Dense
from vlm_jax.types import Dtype


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x). Source: openai/CLIP, clip/model.py, QuickGELU."""
    return x * jax.nn.sigmoid(1.702 * x)


Activation = Literal["gelu", "gelu_tanh", "hard_swish", "quick_gelu", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "hard_swish": jax.nn.hard_swish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _layer(act: Callable[[jax.Array], jax.Array], dense: Dense, first: jax.Array, *factors: jax.Array) -> jax.Array:
    hidden = act(first)
    for factor in factors:
        hidden = hidden * factor
    return dense(hidden)


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    A `depth` above 2 adds linear layers, each after an activation, between the two; with a depth of
    1 there is only `down`, and hidden_dim and the activation are unused.

    Attributes:
      hidden_dim: width between the two products.
      first_dim: output width of the first layer, where it differs from that of other hidden ones; or None.
      activation: a name of `ACTIVATIONS`.
      gated: multiplies by a second projection, as in SwiGLU.
      out_dim: output width; the input's when None.
      use_bias: biases on every linear layer.
      depth: number of linear layers.
      clips: `clips` of every linear layer; see `Dense`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 (GLU variants), eq. 6.
    """

    hidden_dim: int
    activation: str
    gated: bool = False
    out_dim: int | None = None
    first_dim: int | None = None
    use_bias: bool = True
    depth: int = 2
    clips: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """Runs the layers.

        Raises:
          ValueError: less than one layer, or a gate with fewer than two layers.
        """
        if self.depth < (2 if self.gated else 1):
            raise ValueError(f"depth: expected at least {2 if self.gated else 1} linear layers, got {self.depth}")
        settings = {
            "use_bias": self.use_bias,
            "clips": self.clips,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        act = ACTIVATIONS[self.activation]
        out = Dense(self.out_dim or x.shape[-1], (axes.MLP, axes.EMBED), name="down", **settings)
        if self.depth == 1:
            return out(x)
        wide = functools.partial(Dense, self.first_dim or self.hidden_dim, (axes.EMBED, axes.MLP), **settings)
        middle = functools.partial(Dense, self.hidden_dim, (axes.EMBED, axes.MLP), **settings)
        inputs = (wide(name="gate")(x), wide(name="up")(x)) if self.gated else (wide(name="up")(x),)

        # The next layer's input is recomputed in the backward pass, which stores only `inputs`.
        layer = nn.remat(lambda dense, *inputs: _layer(act, dense, *inputs), prevent_cse=False)
        for i in range(self.depth - 2):
            inputs = (layer(middle(name=f"middle_{i}"), *inputs),)
        return layer(out, *inputs)
