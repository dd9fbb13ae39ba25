"""Low-rank adapters (LoRA) as trees: in place for `apply`, and merged into their kernels.

A run's parameters have them as a part of their own, `params["lora"]`, whose tree repeats the modules of the model, so
that the model's own tree, checkpoint maps and exports are the same with and without them.
"""

import dataclasses
import functools
import zlib
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.config import ConfigError, check_fields
from vlm_jax.leaves import joined
from vlm_jax.ranges import Positive, Range
from vlm_jax.types import Dtype, Params, Tree, static_field, struct

LORA = "lora"  # the part of a run's parameters
A, B = "lora_a", "lora_b"  # its leaves in every module
ADAPTER = "adapter"  # beside a kernel, in the parameters that a model is applied with


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """`config.lora`: adapters of linear layers. What learns, and how fast, is in `learning_rates` of a stage: "lora".

    Attributes:
      rank: of the adapters; 0 for none.
      alpha: the adapters' products are multiplied by alpha / rank.
      dropout: share of an adapter's inputs that are zeroed in training, each adapter by itself.
      rslora: multiplies by alpha / sqrt(rank) instead.
      target: patterns of paths of kernels or of modules, as in `leaves.matches`: "decoder/*/attention",
        "encoder", "connector/mlp/up/kernel". Only linear layers have adapters, the head that gives logits has none.
        In a `hybrid` decoder (Qwen3.5) three of four layers have "decoder/*/delta" in place of an attention.

    Source: Hu et al. 2022 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA), definition 3.1.
    """

    rank: Annotated[int, Range(0, 2**16)] = 0
    alpha: Positive = 16.0
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    rslora: bool = False
    target: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self, "config.lora.")
        if bool(self.rank) != bool(self.target):
            raise ConfigError(
                f"config.lora: adapters need a rank and a target, got rank={self.rank} and target={self.target}; set "
                "both, or neither"
            )

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


NO_LORA = LoraSettings()


@struct
class Adapter:
    """What is added to the output of a linear layer.

    Attributes:
      a, b: the factors; with a leading axis in a stack of layers.
      key: of the dropout; None for no dropout.
      scale, dropout: as in `LoraSettings`.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]
    key: Tree
    scale: float = static_field()
    dropout: float = static_field()

    def __call__(self, x: Float[Array, "*batch d_in"], dtype: Dtype) -> Float[Array, "*batch d_out"]:
        """dropout(x) a b * scale."""
        x = x.astype(dtype)
        if self.key is not None:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return jnp.dot(jnp.dot(x, self.a.astype(dtype)), self.b.astype(dtype)) * jnp.asarray(self.scale, dtype)


def adapted(params: Params, settings: LoraSettings, key: jax.Array | None = None) -> Params:
    """A run's parameters as a model is applied with them: each adapter beside its kernel.

    Args:
      params: with the part `lora`; unchanged without it.
      settings: the run's.
      key: of the dropout in training; None for none.
    """
    if LORA not in params:
        return params
    dropped = key if settings.dropout else None

    def place(tree: Params, path: str) -> Params:
        if A not in tree:
            return {name: place(value, f"{path}/{name}") for name, value in tree.items()}
        a, b, keys = tree[A], tree[B], None
        if dropped is not None:
            keys = jax.random.split(jax.random.fold_in(dropped, zlib.crc32(path.encode())), a.shape[:-2])
        return {ADAPTER: Adapter(a, b, keys, settings.scale, settings.dropout)}

    base = {part: tree for part, tree in params.items() if part != LORA}
    return joined(base, place(params[LORA], ""))


def merged(params: Params, settings: LoraSettings) -> Params:
    """A run's parameters without the part `lora`: its products added to the kernels, each in the kernel's dtype."""
    if LORA not in params:
        return params

    def add(tree: Params, adapters: Params) -> Params:
        if A in adapters:
            kernel = tree["kernel"]
            sharding = kernel.sharding if isinstance(kernel, jax.Array) and kernel.committed else None
            return {**tree, "kernel": _merger(settings.scale, sharding)(kernel, adapters[A], adapters[B])}
        return {name: add(value, adapters[name]) if name in adapters else value for name, value in tree.items()}

    return add({part: tree for part, tree in params.items() if part != LORA}, params[LORA])


@functools.lru_cache(maxsize=64)
def _merger(scale: float, sharding: Tree) -> Tree:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return jax.jit(merge, out_shardings=sharding)
