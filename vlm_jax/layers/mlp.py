"""Feed-forward blocks: plain (two linear layers) and gated (SwiGLU and similar)."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.adapter import ADAPTER
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mesh_axes import active_mesh, num_shards, spec_of
from vlm_jax.types import Dtype, Tree

LANES = 128  # of a TPU's registers and matrix units


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
      activation: a name of `ACTIVATIONS`.
      gated: multiplies by a second projection, as in SwiGLU.
      out_dim: output width; the input's when None.
      use_bias: biases on every linear layer.
      depth: number of linear layers.
      most_parts: the hidden units are computed in up to this many parts, one after another, each recomputed in the
        backward pass, so that training holds the hidden values of one part only. A part is a multiple of `LANES`
        units. Units that a mesh divides over devices, layers with biases or adapters, and other depths are not parted.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 (GLU variants), eq. 6.
    """

    hidden_dim: int
    activation: str
    gated: bool = False
    out_dim: int | None = None
    use_bias: bool = True
    depth: int = 2
    most_parts: int = 1
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
        if (parts := self._parts()) > 1:
            return self._in_parts(x, parts)
        settings = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.activation]
        out = Dense(self.out_dim or x.shape[-1], (axes.MLP, axes.EMBED), name="down", **settings)
        if self.depth == 1:
            return out(x)
        wide = functools.partial(Dense, self.hidden_dim, (axes.EMBED, axes.MLP), **settings)
        inputs = (wide(name="gate")(x), wide(name="up")(x)) if self.gated else (wide(name="up")(x),)

        # The next layer's input is recomputed in the backward pass, which stores only `inputs`.
        layer = nn.remat(lambda dense, *inputs: _layer(act, dense, *inputs), prevent_cse=False)
        for i in range(self.depth - 2):
            inputs = (layer(wide(name=f"middle_{i}"), *inputs),)
        return layer(out, *inputs)

    def _parts(self) -> int:
        """The number of parts of the hidden units."""
        mesh = active_mesh()
        sharded = mesh is not None and num_shards(spec_of((axes.MLP,), (self.hidden_dim,), mesh)[0], mesh) > 1
        if self.depth != 2 or self.use_bias or sharded or self.is_initializing() or self._has_adapter():
            return 1
        return max((n for n in range(1, self.most_parts + 1) if self.hidden_dim % (n * LANES) == 0), default=1)

    def _has_adapter(self) -> bool:
        return any(ADAPTER in layer for layer in self.variables["params"].values())

    def _in_parts(self, x: Float[Array, "*batch D"], parts: int) -> Float[Array, "*batch E"]:
        """The sum over parts of the hidden units, accumulated in float32, as are the gradients with respect to x."""
        params = nn.meta.unbox(self.variables["params"])
        own = self.clone(parent=None, hidden_dim=self.hidden_dim // parts, most_parts=1)
        part = jax.checkpoint(lambda params, x: own.apply({"params": params}, x))

        def add(total: jax.Array, params: Tree) -> tuple[jax.Array, None]:
            return total + part(params, wide).astype(total.dtype), None

        wide = x.astype(jnp.float32)
        kernels = {
            name: {"kernel": _split(layer["kernel"], parts, axis=0 if name == "down" else 1)}
            for name, layer in params.items()
        }
        width = self.out_dim or x.shape[-1]
        total, _ = jax.lax.scan(add, jnp.zeros((*x.shape[:-1], width), jnp.float32), kernels)
        return total.astype(self.dtype)


def _split(array: jax.Array, parts: int, axis: int) -> jax.Array:
    """[.., n, ..] -> [parts, .., n / parts, ..]."""
    shape = array.shape
    return jnp.moveaxis(array.reshape(*shape[:axis], parts, -1, *shape[axis + 1 :]), axis, 0)
