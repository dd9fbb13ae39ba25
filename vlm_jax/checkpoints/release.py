"""A release: its tensors, its rules, and the files of its folder, independent of models."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.hub import Checkpoint, CheckpointFileError
from vlm_jax.checkpoints.params import export_params, import_params
from vlm_jax.checkpoints.rules import Rule, matcher, matching
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.checkpoints.saving import check_vacant, copy_companions, save_archive, save_checkpoint, target_folder
from vlm_jax.types import Config, Fields, Params


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """A part of the model that is read from another checkpoint, and not written with the release.

    Attributes:
      part: its name in `params`.
      checkpoint: tensors, all of which are used.
      rules: conversion from these tensors to parameters.
    """

    part: str
    checkpoint: Checkpoint
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Release:
    """A released checkpoint with its conversion rules.

    Attributes:
      config: the released settings, in the schema of the release.
      checkpoint: the released tensors, read when they are indexed.
      folder: its folder, with the files of the tokenizer and the processor.
      rules: conversion from released tensors to parameters; targets are paths in `params`.
      ignore: regular expressions for whole released keys that the model does not use; kept unread and
        written back.
      drawn: randomly initialised parts of the model that replace the release's; `rules` save those they name.
      borrowed: parts of the model that are read from other checkpoints.
      run: checkpoints of a run whose parameters replace the release's; None without one.
      trained: of `drawn`, the parts that the run has trained.
    """

    config: Config
    checkpoint: Checkpoint
    folder: Path
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    borrowed: tuple[Borrowed, ...] = ()
    run: Path | None = None
    trained: tuple[str, ...] = ()

    def of_run(self, checkpoints: Path) -> "Release":
        """The release with the parameters of a run, which has all parts but the borrowed ones."""
        return dataclasses.replace(self, run=checkpoints, trained=self.drawn)

    @property
    def initialised(self) -> tuple[str, ...]:
        """Parts that are randomly initialised."""
        return tuple(part for part in self.drawn if part not in self.trained)

    def without(self, *parts: str) -> "Release":
        """The release with `parts` replaced by randomly initialised ones."""
        lost = _rules_of(self.rules, parts)
        patterns = tuple(matcher(source).pattern for rule in lost for source in rule.sources)
        kept = tuple(rule for rule in self.rules if rule not in lost)
        drawn = tuple(dict.fromkeys((*self.drawn, *parts)))
        trained = tuple(part for part in self.trained if part not in parts)
        return dataclasses.replace(self, rules=kept, ignore=(*self.ignore, *patterns), drawn=drawn, trained=trained)

    def with_other(self, part: str, changes: Config) -> "Release":
        """The release with a randomly initialised `part` of the same names, which `changes` of the config describe."""
        other = self.without(part)
        return dataclasses.replace(other, rules=self.rules, config={**self.config, **changes})

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Parts that replaced the release's and have no names in the released schema."""
        return tuple(part for part in self.drawn if not _rules_of(self.rules, (part,)))

    def read(self, targets: Config) -> Fields:
        """The parameters of all parts of the release.

        Args:
          targets: {part: tree of `jax.ShapeDtypeStruct`}; one without a sharding is put on the default device.

        Raises:
          CheckpointMismatch: unused and missing keys and wrong shapes, all in one message.
          CheckpointError: of a run, there is no complete checkpoint, or it has other shapes.
        """
        others = [other for other in self.borrowed if other.part in targets and other.part not in self.drawn]
        absent = {*self.initialised, *(other.part for other in self.borrowed)}
        own = {part: tree for part, tree in targets.items() if part not in absent}
        if self.run is not None:
            params = read_parts(self.run, jax.tree.map(_on_a_device, own)) if own else {}
        else:
            drawn = _rules_of(self.rules, self.drawn)
            rules = [rule for rule in self.rules if rule not in drawn]
            params = import_params(rules, self.checkpoint, own, ignore=self.ignore)
        for other in others:
            params |= import_params(other.rules, other.checkpoint, {other.part: targets[other.part]})
        return params

    def save(
        self,
        folder: str | os.PathLike[str],
        params: Params,
        *,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> tuple[Path, ...]:
        """Writes config and weights under the released names, and the files of tokenizer and processor.

        Args:
          folder: created if missing; must not contain a checkpoint.
          params: {part: tree}.
          finish: called to change the other files of the folder before its weights are written.

        Returns:
          The files written.

        Raises:
          CheckpointFileError: no path, the folder contains a checkpoint, or a part has no name in the released schema.
          CheckpointMismatch: `params` do not have the release's shapes.
        """
        folder = target_folder(folder)
        if self.unnamed:
            parts = " and the ".join(self.unnamed)
            raise CheckpointFileError(
                f"{folder}: the released schema has no names for the {parts} that replaced the release's own; "
                "save the parameters as a run does, or load the release without the replacement"
            )
        borrowed = {other.part for other in self.borrowed}
        tensors: Fields = export_params(
            self.rules, {part: tree for part, tree in params.items() if part not in borrowed}
        )
        for key, tensor in self.checkpoint.items():
            if key not in tensors and matching(self.ignore, key):
                tensors[key] = tensor  # read when its shard is written
        check_vacant(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        config = with_dtype(self.config, {np.dtype(tensor.dtype) for tensor in tensors.values()})
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        companions = copy_companions(self.folder, folder)
        finish(folder)
        save = save_archive if self.checkpoint.archive else save_checkpoint  # last: a folder with weights is complete
        return (path, *map(Path, companions), *save(folder, tensors))


def with_dtype(config: Config, dtypes: Collection[np.dtype]) -> Config:
    """A config whose `dtype` or `torch_dtype`, also in its sections, is that of the tensors that are saved.

    transformers computes in the dtype that the config states, and would round tensors that are saved in a wider one.

    Args:
      config: in the schema of the release.
      dtypes: of the tensors; the widest floating-point one counts.
    """
    floats = sorted((one for one in dtypes if jnp.issubdtype(one, jnp.floating)), key=lambda one: one.itemsize)
    return _restated(config, floats[-1].name) if floats else config


def _restated(config: Config, dtype: str) -> Config:
    found: Fields = {}
    for key, value in config.items():
        stated = key in ("dtype", "torch_dtype") and isinstance(value, str)
        found[key] = dtype if stated else _restated(value, dtype) if isinstance(value, Mapping) else value
    return found


def _rules_of(rules: Sequence[Rule], parts: Sequence[str]) -> list[Rule]:
    return [rule for rule in rules if any(_of_part(target, parts) for target in rule.targets)] if parts else []


def _of_part(target: str, parts: Sequence[str]) -> bool:
    return re.match(rf"({'|'.join(map(re.escape, parts))})/", target) is not None


def _on_a_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """With the default device where it has no sharding."""
    if leaf.sharding is not None:
        return leaf
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return leaf.update(sharding=jax.sharding.SingleDeviceSharding(device))
