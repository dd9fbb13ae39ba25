"""Mixture of experts: each token goes through the few feed-forwards that the router selects, and through shared ones.

Tokens are sorted by expert, and the experts run as grouped products (`layers.grouped`), so that no expert is
computed for tokens that are not routed to it. Under a mesh each device holds the experts of its share of the
`expert` axis and runs them for the tokens that it holds; results are summed over the axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.grouped import Dot, by_group
from vlm_jax.layers.mesh_axes import active_mesh, spec_of
from vlm_jax.layers.mlp import ACTIVATIONS, Mlp
from vlm_jax.layers.router import Router, Routing
from vlm_jax.types import Config, Dtype

_INIT = jax.jit(nn.initializers.lecun_normal(batch_axis=(0,)), static_argnums=(1, 2))


class MixtureOfExperts(nn.Module):
    """The weighted sum of the selected experts, each a gated feed-forward, plus one shared by all tokens.

    Attributes:
      hidden_dim: hidden width F of an expert.
      shared_dim: hidden width of the shared feed-forward, which has no routing weight; 0 for none.
      router: keyword arguments of `Router`.
      activation: a name of `ACTIVATIONS`.
      shared_gate: multiplies the shared feed-forward of a token by sigmoid(a learned product with the token).
      dtype: dtype of the experts' products; the router and the sum of the experts are float32.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: a gate without a shared feed-forward.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), eq. 20 to 22; transformers, models/qwen2_moe, for the shared gate.
    """

    hidden_dim: int
    shared_dim: int
    router: Config
    activation: str = "silu"
    shared_gate: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.shared_gate and not self.shared_dim:
            raise ValueError("shared_gate: expected a shared feed-forward, got shared_dim 0; set shared_dim")
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        routing = Router(name="router", param_dtype=self.param_dtype, **self.router)(x)
        experts = Experts(self.router["num_experts"], self.hidden_dim, self.activation, name="experts", **settings)
        out = experts(x, routing)
        if self.shared_dim:
            shared = Mlp(self.shared_dim, self.activation, gated=True, use_bias=False, name="shared", **settings)(x)
            if self.shared_gate:
                gate = Dense(1, (axes.EMBED, axes.CLASSES), use_bias=False, name="shared_gate", **settings)(x)
                shared = shared * jax.nn.sigmoid(gate)
            out = out + shared
        return out


class Experts(nn.Module):
    """`num_experts` gated feed-forwards, their kernels stacked; each token goes through its selected ones.

    Attributes:
      num_experts: E.
      hidden_dim, activation, dtype, param_dtype: as in `MixtureOfExperts`.
    """

    num_experts: int
    hidden_dim: int
    activation: str
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
        width = x.shape[-1]

        def kernel(name: str, *names: str) -> jax.Array:
            shape = (self.num_experts, *(width if axis == axes.EMBED else self.hidden_dim for axis in names))
            value = self.param(name, with_axes(_INIT, axes.EXPERT, *names), shape, self.param_dtype)
            return value.astype(self.dtype)

        kernels = (
            kernel("gate", axes.EMBED, axes.MLP),
            kernel("up", axes.EMBED, axes.MLP),
            kernel("down", axes.MLP, axes.EMBED),
        )
        act = jax.checkpoint(ACTIVATIONS[self.activation], prevent_cse=False)

        def run(rows: jax.Array, dot: Dot, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return dot(act(dot(rows, gate)) * dot(rows, up), down)

        return _over_mesh(functools.partial(_routed, run, self.num_experts), x.astype(self.dtype), routing, kernels)


def _routed(
    run: Callable[..., jax.Array],
    total: int,
    x: jax.Array,
    routing: Routing,
    kernels: tuple[jax.Array, ...],
    first: int | jax.Array = 0,
) -> jax.Array:
    """The float32 sum over a token's experts, restricted to the given kernels: experts `first` onwards of `total`."""
    tokens, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    num_selected, num_experts = routing.expert.shape[-1], kernels[0].shape[0]
    own = routing.expert.reshape(-1) - first
    own = jnp.where((own >= 0) & (own < num_experts), own, num_experts)  # experts of other devices come last
    order = jnp.argsort(own, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[own].add(1, mode="drop")
    expected = len(own) * num_experts // total
    rows = _by_expert(tokens, order, inverse)
    out = by_group(lambda rows, dot: run(rows, dot, *kernels), rows, sizes, expected=expected)
    out = _by_token(out, order, inverse)
    weighted = out.reshape(-1, num_selected, width).astype(jnp.float32) * routing.weight.reshape(-1, num_selected, 1)
    return weighted.sum(axis=1).reshape(x.shape)


# Both gather, and so do their gradients: TPUs scatter row by row.
@jax.custom_vjp
def _by_expert(tokens: Float[Array, "M D"], order: Int[Array, "Mk"], inverse: Int[Array, "Mk"]) -> Float[Array, "Mk D"]:
    """Row r is the token of choice `order[r]`; choices t k to t k + k - 1 are those of token t.

    `inverse` is the inverse permutation of `order`.
    """
    return tokens[order // (order.shape[0] // tokens.shape[0])]


def _by_expert_backward(saved: tuple[jax.Array, int], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    inverse, count = saved
    summed = gradient[inverse].reshape(count, -1, gradient.shape[-1]).astype(jnp.float32).sum(axis=1)
    return summed.astype(gradient.dtype), None, None


_by_expert.defvjp(
    lambda tokens, order, inverse: (_by_expert(tokens, order, inverse), (inverse, tokens.shape[0])),
    _by_expert_backward,
)


@jax.custom_vjp
def _by_token(rows: Float[Array, "Mk D"], order: Int[Array, "Mk"], inverse: Int[Array, "Mk"]) -> Float[Array, "Mk D"]:
    """The rows back in the places that `order` took them from."""
    del order
    return rows[inverse]


_by_token.defvjp(
    lambda rows, order, inverse: (_by_token(rows, order, inverse), order),
    lambda order, gradient: (gradient[order], None, None),
)


def _over_mesh(
    routed: Callable[..., jax.Array], x: jax.Array, routing: Routing, kernels: tuple[jax.Array, ...]
) -> jax.Array:
    """Runs `routed` on every device with its tokens and its share of the experts, in the dtype of `x`."""
    mesh = active_mesh()
    if mesh is None:
        return routed(x, routing, kernels).astype(x.dtype)
    tokens = spec_of((axes.BATCH, axes.LENGTH, None), x.shape, mesh)
    inner = (axes.EXPERT, None, axes.MLP), (axes.EXPERT, None, axes.MLP), (axes.EXPERT, axes.MLP, None)
    specs = tuple(spec_of(names, kernel.shape, mesh) for names, kernel in zip(inner, kernels, strict=True))
    expert, summed = specs[0][0], _mesh_axes(specs[2])

    def on_device(x: jax.Array, routing: Routing, kernels: tuple[jax.Array, ...]) -> jax.Array:
        # A kernel's gradient is summed over all tokens, a token's over all shares of the experts.
        x = _varying(x, summed)
        kernels = tuple(_varying(kernel, _mesh_axes(tokens)) for kernel in kernels)
        first = 0 if expert is None else jax.lax.axis_index(expert) * kernels[0].shape[0]
        out = routed(x, routing, kernels, first)
        return (jax.lax.psum(out, summed) if summed else out).astype(x.dtype)

    run = jax.shard_map(on_device, mesh=mesh, in_specs=(tokens, tokens, specs), out_specs=tokens)
    return run(x, routing, kernels)


def _mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,)))


def _varying(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(x, mesh_axes, to="varying") if mesh_axes else x
