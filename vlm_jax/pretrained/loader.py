"""Loads a released checkpoint: selects its family and reads its parameters to devices."""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.checkpoints.hub import Checkpoint, CheckpointFileError, fetch
from vlm_jax.checkpoints.mapped import open_release
from vlm_jax.checkpoints.orbax import CHECKPOINTS
from vlm_jax.checkpoints.peft import with_adapter
from vlm_jax.checkpoints.release import Release
from vlm_jax.config import did_you_mean, read_json
from vlm_jax.paths import absolute
from vlm_jax.pretrained.big_vision_paligemma import completed
from vlm_jax.pretrained.budgets import Section, with_budget
from vlm_jax.pretrained.configured import configured
from vlm_jax.pretrained.family import Description, Family, PretrainedError, Resize, marker
from vlm_jax.pretrained.module_names import MODULE_NAMES
from vlm_jax.pretrained.named_tower import with_named_tower
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.pretrained.processing import end_ids, read_processor
from vlm_jax.pretrained.recognition import check_tensors, recognised
from vlm_jax.sharding.rules import shardings
from vlm_jax.system import System
from vlm_jax.types import Config, Dtype

Read = TypeVar("Read")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def choose_family(config: Config, families: Mapping[str, Family]) -> Family:
    """The entry of the registration table for a released config; it refuses settings that fit no model by name.

    Raises:
      PretrainedError: no entry; lists the registered ones.
    """
    name = marker(config)
    if name not in families:
        raise PretrainedError(
            f"no family is registered for '{name}'{did_you_mean(name, families)}\nregistered: "
            + ", ".join(sorted(families))
        )
    return functools.partial(_described, families[name])


def _described(family: Family, config: Config, checkpoint: Config, *, dtype: Dtype, param_dtype: Dtype) -> Description:
    """What the family makes of a config; sizes that no check of a single value can refuse are a PretrainedError too."""
    try:
        return family(config, checkpoint, dtype=dtype, param_dtype=param_dtype)
    except (ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        if isinstance(error, ValueError) and type(error) is not ValueError:
            raise  # says by itself what is wrong
        told = f"{type(error).__name__}: {error}"
        raise PretrainedError(
            f"config.json: settings that do not fit one another, or the checkpoint: {told}"
        ) from error


def open_system(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str,
    param_dtype: str | None = None,
    config: Config | None = None,
) -> System:
    """The system of a release, or of a run that started from one, without reading tensors.

    Args:
      source: as in `from_pretrained`.
      families: the registration table.
      dtype: of the products.
      param_dtype: of the stored parameters; `dtype` when None.
      config: as in `from_pretrained`; not for a run.

    Raises:
      As `from_pretrained`.
    """
    if is_run(source):
        if config is not None:
            raise PretrainedError(f"config: {source} is a run, which has its own; pass a release")
        return _of_run(Path(absolute(source)), families, dtype, param_dtype)
    return _opened(source, families, (dtype, param_dtype or dtype), config)[0]


def load(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str,
    mesh: Mesh | None,
    image_size: int | None,
    config: Config | None,
    adapter: str | os.PathLike[str] | None = None,
    budget: tuple[int | None, Section | None, Section | None] = (None, None, None),
) -> Pretrained:
    """`from_pretrained` with the registration table as an argument."""
    _check_types(source, mesh, config, adapter)
    if is_run(source):
        for name, given in (("adapter", adapter), ("image_size", image_size)):
            if given is not None:
                raise PretrainedError(f"{name}: {source} is a run, which has its own; pass a release")
        system, family, resize = open_system(source, families, dtype=dtype, config=config), None, None
    else:
        system, family, resize = _opened(source, families, (dtype, dtype), config, adapter)
    if any(part is not None for part in budget):
        tokens, reducer, connector = budget
        system = with_budget(system, tokens, reducer=reducer, connector=connector)
    params = system.initial(jax.random.key(0), mesh)
    release = system.release
    assert release is not None
    if image_size is not None:
        if resize is None or family is None:
            raise PretrainedError(f"image_size: '{marker(release.config)}' does not support resizing at load")
        released, params, shapes = resize(params, image_size)
        checkpoint = release.checkpoint
        system = _system(
            released, {**checkpoint, **shapes}, checkpoint, release.folder, family, (dtype, dtype), image_size
        )[0]
        boxed = system.boxed_shapes()
        if mesh is not None:
            params = jax.tree.map(jax.device_put, params, shardings(boxed, mesh))
        else:
            params = jax.tree.map(lambda leaf, _: jax.device_put(leaf), params, nn.meta.unbox(boxed))
    return Pretrained(system, params, image_size)


def _check_types(source: object, mesh: object, config: object, adapter: object) -> None:
    for name, given, kind, form in (
        ("source", source, str | os.PathLike, "a folder, a file or organisation/name"),
        ("adapter", adapter, str | os.PathLike | None, "a folder or organisation/name"),
        ("config", config, Mapping | None, "a dict of released settings"),
        ("mesh", mesh, Mesh | None, "a jax.sharding.Mesh"),
    ):
        if not isinstance(given, kind):
            raise PretrainedError(f"{name}: expected {form}, got {given!r}")


def is_run(source: str | os.PathLike[str]) -> bool:
    """Whether a folder is the workdir of a run."""
    return os.path.isdir(os.path.join(absolute(source), CHECKPOINTS))  # False for a text that no file can have


def _of_run(workdir: Path, families: Mapping[str, Family], dtype: str, param_dtype: str | None) -> System:
    """The system of a run started with `config.release`, whose parameters are the run's newest.

    Raises:
      PretrainedError: the run was not started from a release.
    """
    config = read_json(workdir / "config.json", CheckpointFileError)
    if not config.get("release"):
        raise PretrainedError(f"{workdir}: this run has no config.release, so it has no processor")
    released = open_system(config["release"], families, dtype=dtype, param_dtype=param_dtype)
    system = configured(released, config)
    assert system.release is not None
    return dataclasses.replace(system, release=system.release.of_run(workdir / CHECKPOINTS))


def _opened(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    dtypes: tuple[str, str],
    config: Config | None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[System, Family, Resize | None]:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise PretrainedError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path = fetch(source)
    folder = path if path.is_dir() else path.parent
    path, config = recognised(path, config)
    family = choose_family(config, families)
    released, checkpoint = with_named_tower(copy.deepcopy(config), open_release(path), folder)
    released = completed(released, checkpoint)
    check_tensors(released, checkpoint, folder)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, fetch(adapter), MODULE_NAMES.get(marker(released), ()))
    system, resize = _system(released, checkpoint, checkpoint, folder, family, dtypes, None)
    return system, family, resize


class _Once(Generic[Read]):
    """Calls a function once, however many systems are made of the one that has it; can be pickled."""

    def __init__(self, read: Callable[[], Read]):
        self._read, self._found = read, list[Read]()

    def __call__(self) -> Read:
        if not self._found:
            self._found.append(self._read())
        return self._found[0]


def _system(
    config: Config,
    tensors: Config,
    checkpoint: Checkpoint,
    folder: Path,
    family: Family,
    dtypes: tuple[str, str],
    image_size: int | None,
) -> tuple[System, Resize | None]:
    """The system, and the function that resizes it."""
    description = family(config, tensors, dtype=DTYPES[dtypes[0]], param_dtype=DTYPES[dtypes[1]])
    release = Release(config, checkpoint, folder, tuple(description.rules), tuple(description.ignore))
    processor = _Once(functools.partial(read_processor, folder, config, description.module, image_size))
    ends = _Once(functools.partial(end_ids, folder, config, description.module))
    system = System(
        description.module,
        description.inputs,
        processor,
        ends,
        release,
    )
    return system, description.resize
