"""Parameters with logical axes: every parameter of the package is created through these helpers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.adapter import ADAPTER
from vlm_jax.types import Dtype, Tree

Initializer = Callable[..., Tree]

# Flax traces an initialiser in every pass of a module, to compare shapes; compiled, it is traced once for each shape.
KERNEL_INIT = jax.jit(nn.initializers.lecun_normal(), static_argnums=(1, 2))


class Named(nn.LogicallyPartitioned):
    """A parameter with a logical name for every dimension; a stack of layers prepends its own.

    Flax's own box constrains its value to the mesh whenever it is unboxed; here the names only determine
    a parameter's sharding (`sharding.rules.shardings`), and unboxing does nothing else.
    """

    def unbox(self, apply_constraint: bool = False) -> Tree:
        del apply_constraint
        return self.value


class LinearKernel(Named):
    """The kernel of a linear layer that can have an adapter."""


def with_axes(init: Initializer, *names: str, box: type[Named] = Named) -> Initializer:
    """An initialiser whose parameter has one logical axis name per dimension, in a box of this class."""
    return functools.partial(_boxed, init, names, box)  # a function in here would be checked anew for every parameter


def _boxed(init: Initializer, names: tuple[str, ...], box: type[Named], *args: Any, **kwargs: Any) -> Named:
    return box(init(*args, **kwargs), names)


class Dense(nn.Module):
    """A linear layer on the last axis, [.., in] -> [.., features].

    Where its parameters have an `adapter`, an `Adapter`, the adapter's output is added; see `vlm_jax.adapter`.

    Attributes:
      features: output width.
      kernel_axes: logical names of the kernel's two axes, input first.
      use_bias: adds a bias, named after the output axis.
      kernel_init: initialiser of the kernel.
      adapts: whether it can have an adapter; False where other modules read the kernel.
      clips: bounds the input and the output by four stored numbers, which are not learned.
      dtype: dtype of the product; parameters are cast to it.
      param_dtype: dtype of the stored parameters.
    """

    features: int
    kernel_axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Initializer = KERNEL_INIT
    adapts: bool = True
    clips: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        if self.clips:
            x = self._clipped(x, "input")
        box, shape = LinearKernel if self.adapts else Named, (x.shape[-1], self.features)
        init = with_axes(self.kernel_init, *self.kernel_axes, box=box)
        y = jnp.dot(x.astype(self.dtype), self.param("kernel", init, shape, self.param_dtype).astype(self.dtype))
        if self.has_variable("params", ADAPTER):
            y = y + self.get_variable("params", ADAPTER)(x, self.dtype)
        if self.use_bias:
            bias = self.param(
                "bias", with_axes(nn.initializers.zeros, self.kernel_axes[1]), (self.features,), self.param_dtype
            )
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return self._clipped(y, "output") if self.clips else y

    def _clipped(self, x: Float[Array, "*batch D"], name: str) -> Float[Array, "*batch D"]:
        """x inside its stored bounds, infinite at first."""
        least, most = (
            jax.lax.stop_gradient(
                self.param(f"{name}_{end}", with_axes(nn.initializers.constant(bound)), (), self.param_dtype)
            ).astype(x.dtype)
            for end, bound in (("min", -jnp.inf), ("max", jnp.inf))
        )
        return jnp.clip(x, least, most)


class Embed(nn.Module):
    """A table of `num_rows` vectors; `__call__` looks up ids, `attend` returns x @ table.T.

    Attributes:
      num_rows: ids are 0 to num_rows - 1.
      features: width of a row.
      init_stddev: standard deviation of the initial table.
      dtype: dtype of the rows that are looked up.
      param_dtype: dtype of the stored table.

    Raises nothing for an id out of range (JAX clamps it); ids are checked on the host.
    """

    num_rows: int
    features: int
    init_stddev: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        self.embedding = self.param(
            "embedding",
            with_axes(nn.initializers.normal(self.init_stddev), axes.VOCAB, axes.EMBED),
            (self.num_rows, self.features),
            self.param_dtype,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        table = self.embedding.astype(self.dtype)
        if x.size == x.shape[-1]:
            # As a column: XLA's CPU backend would compute a row inside the loop of the preceding norm.
            return jnp.dot(table, x.reshape(-1, 1)).reshape(*x.shape[:-1], -1)
        return jnp.dot(x, table.T)
