"""Which kernels have adapters, and their parameters at the start."""

import functools
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax import axes
from vlm_jax.adapter import LORA, A, B, LoraSettings
from vlm_jax.config import ConfigError
from vlm_jax.layers.dense import LinearKernel, Named
from vlm_jax.leaves import boxes, map_with_path, matches
from vlm_jax.types import Params


def lora_shapes(boxed: Params, settings: LoraSettings) -> Params:
    """The boxed float32 shapes of the adapters, as the part `lora`; empty where there are none.

    Args:
      boxed: shapes of the model's parameters, in the boxes that name their axes.
      settings: the run's.

    Raises:
      ConfigError: a pattern that matches no linear layer; lists those of its part.
    """
    linear = {path: box for path, box in boxes(boxed).items() if isinstance(box, LinearKernel)}
    for pattern in settings.target:
        if not any(matches(pattern, path) for path in linear):
            raise ConfigError(f"config.lora.target: no linear layer matches '{pattern}'; {_listed(pattern, linear)}")
    found: Params = {}
    for path, box in linear.items():
        if not any(matches(pattern, path) for pattern in settings.target):
            continue
        module = path.rpartition("/")[0]
        (*stack, d_in, d_out), (*names, first, last) = box.value.shape, box.names
        a, b = ((*stack, d_in, settings.rank), (*stack, settings.rank, d_out))
        found[f"{module}/{A}"] = Named(jax.ShapeDtypeStruct(a, jnp.float32), (*names, first, axes.RANK))
        found[f"{module}/{B}"] = Named(jax.ShapeDtypeStruct(b, jnp.float32), (*names, axes.RANK, last))
    return {LORA: unflatten_dict(found, sep="/")} if found else {}


def draw_lora(key: jax.Array, targets: Params) -> Params:
    """Adapters at the start, each on its devices: `a` uniform in ±1 / sqrt(d_in), `b` zero, as in peft.

    Args:
      key: random key.
      targets: {"lora": tree of `jax.ShapeDtypeStruct`}, with shardings on a mesh.

    Source: huggingface/peft, tuners/lora/layer.py, reset_lora_parameters.
    """

    def draw(key: jax.Array, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith(f"/{B}"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1 / math.sqrt(leaf.shape[-2])
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

    out = jax.tree.map(lambda leaf: leaf.sharding, targets)
    return jax.jit(lambda key: map_with_path(functools.partial(draw, key), targets), out_shardings=out)(key)


def _listed(pattern: str, linear: Sequence[str] | Params) -> str:
    """The linear layers of the pattern's part, or of all parts."""
    part = pattern.split("/")[0]
    own = [path for path in linear if path.startswith(f"{part}/")] or list(linear)
    return "those that can have an adapter are " + ", ".join(own)
