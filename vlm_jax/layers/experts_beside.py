"""A mixture of experts beside a feed-forward, with norms, a scaled router and a weight of each expert's own."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.moe import Experts
from vlm_jax.layers.norm import Norm, NormKind, unit_rms
from vlm_jax.layers.router import Router, Routing
from vlm_jax.types import Config, Dtype


class ExpertsBeside(nn.Module):
    """norm(experts(norm(x))); the router reads x / rms(x) * scale / sqrt(D), and weights are scaled by expert.

    Attributes:
      hidden_dim: hidden width of an expert.
      router: keyword arguments of `Router`.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm: kind of both norms.
      norm_epsilon: epsilon of both, and of the router's input.
      dtype: dtype of the experts' products; the router is float32.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/gemma4, Gemma4TextDecoderLayer and Gemma4TextRouter.
    """

    hidden_dim: int
    router: Config
    activation: str
    norm: NormKind
    norm_epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": self.norm, "epsilon": self.norm_epsilon, **settings}
        width, count = x.shape[-1], self.router["num_experts"]
        scale = self.param("router_scale", with_axes(nn.initializers.ones, axes.NORM), (width,), self.param_dtype)
        read = unit_rms(x.astype(jnp.float32), self.norm_epsilon) * scale.astype(jnp.float32)[None, None] * width**-0.5
        routing = Router(name="router", param_dtype=self.param_dtype, **self.router)(read)
        own = self.param("expert_scale", with_axes(nn.initializers.ones, axes.CLASSES), (count,), self.param_dtype)
        routing = Routing(routing.expert, routing.weight * own.astype(jnp.float32)[routing.expert])
        experts = Experts(count, self.hidden_dim, self.activation, name="experts", **settings)
        out = experts(Norm(name="norm", **norm)(x), routing)
        return Norm(name="post_norm", **norm)(out)
