"""Loading a released checkpoint: which family its config is of, and its parameters onto their devices."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.checkpoints.hub import fetch, read_config
from vlm_jax.checkpoints.mapped import open_release
from vlm_jax.checkpoints.params import import_params
from vlm_jax.config import did_you_mean
from vlm_jax.pretrained.family import Description, Family, PretrainedError, marker
from vlm_jax.pretrained.named_tower import with_named_tower
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.sharding.rules import shardings

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def choose_family(config: Mapping[str, Any], families: Mapping[str, Family]) -> Family:
    """The entry of the registration table for a released config.

    Raises:
      PretrainedError: no entry; lists those there are.
    """
    name = marker(config)
    if name not in families:
        raise PretrainedError(
            f"no family is registered for '{name}'{did_you_mean(name, families)}\nregistered: "
            + ", ".join(sorted(families))
        )
    return families[name]


def load(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str,
    mesh: Mesh | None,
    image_size: int | None,
    config: Mapping[str, Any] | None,
) -> Pretrained:
    """`from_pretrained` with the registration table as an argument."""
    if dtype not in DTYPES:
        raise PretrainedError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path = fetch(source)
    folder = path if path.is_dir() else path.parent
    if config is None:
        config = read_config(folder)
    family = choose_family(config, families)
    released, checkpoint = with_named_tower(copy.deepcopy(dict(config)), open_release(path), folder)
    dtypes = {"dtype": DTYPES[dtype], "param_dtype": DTYPES[dtype]}
    description = family(released, checkpoint, **dtypes)
    params = import_params(description.rules, checkpoint, _targets(description, mesh), ignore=description.ignore)
    if image_size is not None:
        if description.resize is None:
            raise PretrainedError(f"image_size: '{marker(released)}' is not resized at load")
        released, params, shapes = description.resize(params, image_size)
        description = family(released, {**checkpoint, **shapes}, **dtypes)
        placed = _targets(description, mesh)
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, getattr(like, "sharding", None)), params, placed)
    return Pretrained(released, description.module, params, description, checkpoint, folder, image_size)


def _targets(description: Description, mesh: Mesh | None) -> Any:
    """Shapes of the parameters, each with its sharding when there is a mesh."""
    boxed = description.boxed_shapes()
    shapes = nn.meta.unbox(boxed)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(boxed, mesh),
    )
