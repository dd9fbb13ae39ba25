"""Batches of steps that were not taken, kept in a workdir to run them again."""

import dataclasses
import io
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from vlm_jax import types
from vlm_jax.paths import absolute
from vlm_jax.types import Tree

REPLAY = "replay"  # folder of a workdir
MAX_BATCHES = 20  # batches that a workdir keeps, the first ones
# Structs of which batches are made, by name.
STRUCTS: dict[str, Any] = {name: found for name, found in vars(types).items() if dataclasses.is_dataclass(found)}


class Replay(NamedTuple):
    """A step to run again: `train_step(state, batch, key)` with the state of a checkpoint, and its `step`.

    Attributes:
      batch: the whole batch of all hosts, as NumPy arrays.
      step: steps before it; the step's random key is `jax.random.fold_in(key, step)`.
      key: random key of the run.
    """

    batch: Tree
    step: int
    key: jax.Array


def write(workdir: epath.Path, step: int, batch: Tree, seed: int) -> None:
    """Writes `replay/STEP.npz` of a workdir, unless it has `MAX_BATCHES` batches.

    Args:
      workdir: of the run.
      step: the step's number, from 1.
      batch: the whole batch.
      seed: of the run.
    """
    path = workdir / REPLAY / f"{step}.npz"
    path.parent.mkdir(exist_ok=True)
    if len(list(path.parent.iterdir())) >= MAX_BATCHES:
        return
    content = io.BytesIO()
    arrays: dict[str, Any] = {"step": step - 1, "seed": seed, **_flat(batch, "batch")}
    np.savez(content, **arrays)
    path.write_bytes(content.getvalue())


def load(path: epath.PathLike) -> Replay:
    """Reads a file of the folder `replay` of a workdir."""
    with np.load(io.BytesIO(epath.Path(absolute(path)).read_bytes())) as file:
        arrays = dict(file)
    return Replay(_made(arrays, "batch"), int(arrays["step"]), jax.random.key(int(arrays["seed"])))


def _flat(value: Tree, path: str) -> dict[str, np.ndarray]:
    """Arrays by path, and names of structs; what is None has no entry."""
    if value is None:
        return {}
    if not dataclasses.is_dataclass(value):
        return {path: np.asarray(value)}
    found = {path: np.asarray(type(value).__name__)}
    for field in dataclasses.fields(value):
        found |= _flat(getattr(value, field.name), f"{path}.{field.name}")
    return found


def _made(arrays: dict[str, np.ndarray], path: str) -> Tree:
    value = arrays.get(path)
    if value is None or value.dtype.kind != "U":
        return value
    cls = STRUCTS[str(value)]
    fields = {field.name: _made(arrays, f"{path}.{field.name}") for field in dataclasses.fields(cls)}
    static = {field.name for field in dataclasses.fields(cls) if field.metadata.get("static")}
    return cls(**{name: _plain(value) if name in static else value for name, value in fields.items()})


def _plain(value: np.ndarray) -> Any:
    """An integer, or a tuple of them."""
    return tuple(value.tolist()) if value.ndim else int(value)
