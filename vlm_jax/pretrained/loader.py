"""Loading a released checkpoint: which family its config is of, and its parameters onto their devices."""

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.checkpoints.hub import fetch, read_config
from vlm_jax.checkpoints.mapped import open_release
from vlm_jax.checkpoints.release import Release
from vlm_jax.config import did_you_mean
from vlm_jax.pretrained.budgets import Section, with_budget
from vlm_jax.pretrained.family import Family, PretrainedError, marker
from vlm_jax.pretrained.named_tower import with_named_tower
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.pretrained.processing import end_ids, read_processor
from vlm_jax.sharding.rules import shardings
from vlm_jax.system import System

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


def open_system(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str,
    config: Mapping[str, Any] | None = None,
) -> System:
    """The system of a release, none of whose tensors are read yet.

    Raises:
      As `from_pretrained`.
    """
    return _opened(source, families, dtype, config)[0]


def load(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str,
    mesh: Mesh | None,
    image_size: int | None,
    config: Mapping[str, Any] | None,
    budget: tuple[int | None, Section | None, Section | None] = (None, None, None),
) -> Pretrained:
    """`from_pretrained` with the registration table as an argument."""
    system, family, resize = _opened(source, families, dtype, config)
    if any(part is not None for part in budget):
        tokens, reducer, connector = budget
        system = with_budget(system, tokens, reducer=reducer, connector=connector)
    params = system.initial(jax.random.key(0), mesh)
    release = system.release
    assert release is not None
    if image_size is not None:
        if resize is None:
            raise PretrainedError(f"image_size: '{marker(release.config)}' is not resized at load")
        released, params, shapes = resize(params, image_size)
        checkpoint = release.checkpoint
        system = _system(released, {**checkpoint, **shapes}, checkpoint, release.folder, family, dtype, image_size)[0]
        boxed = system.boxed_shapes()
        if mesh is not None:
            params = jax.tree.map(jax.device_put, params, shardings(boxed, mesh))
        else:
            params = jax.tree.map(lambda leaf, _: jax.device_put(leaf), params, nn.meta.unbox(boxed))
    return Pretrained(system, params, image_size)


def _opened(
    source: str | os.PathLike[str], families: Mapping[str, Family], dtype: str, config: Mapping[str, Any] | None
) -> tuple[System, Family, Any]:
    if dtype not in DTYPES:
        raise PretrainedError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path = fetch(source)
    folder = path if path.is_dir() else path.parent
    if config is None:
        config = read_config(folder)
    family = choose_family(config, families)
    released, checkpoint = with_named_tower(copy.deepcopy(dict(config)), open_release(path), folder)
    system, resize = _system(released, checkpoint, checkpoint, folder, family, dtype, None)
    return system, family, resize


def _system(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    checkpoint: Any,
    folder: Path,
    family: Family,
    dtype: str,
    image_size: int | None,
) -> tuple[System, Any]:
    """The system, and what makes it one for images of another size."""
    description = family(config, tensors, dtype=DTYPES[dtype], param_dtype=DTYPES[dtype])
    release = Release(config, checkpoint, folder, tuple(description.rules), tuple(description.ignore))
    processor = functools.partial(read_processor, folder, config, description.module, image_size)
    system = System(
        description.module,
        description.inputs,
        processor,
        functools.partial(end_ids, folder, config, description.module),
        release,
    )
    return system, description.resize
