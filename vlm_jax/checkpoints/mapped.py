"""A release stored as Orbax arrays: our parameters, its other tensors, and the table for converting back.

    params/                our tree of parameters, as Orbax writes it
    carried/               the release's tensors without a parameter, if any
    checkpoint_map.json    the rules, and shapes and dtypes of both formats; written last
    config.json, ..        the release's other files, without its weights

So any release can be restored from it exactly, under its own names.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 (registers its dtype names with NumPy)
import numpy as np
from etils import epath

from vlm_jax.checkpoints import ops
from vlm_jax.checkpoints.arrays import open_arrays, save_arrays
from vlm_jax.checkpoints.hub import MAP_FILE, PARAMS, Checkpoint, CheckpointFileError, LazyTensor, open_checkpoint
from vlm_jax.checkpoints.lazy import lazy_release
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.plan import Step, export_plan
from vlm_jax.checkpoints.rules import Rule
from vlm_jax.config import read_json
from vlm_jax.types import Config, Fields

CARRIED = "carried"  # like PARAMS: a folder, and a prefix of the rules' targets


def is_mapped(path: Path) -> bool:
    """Whether a folder has Orbax arrays converted from a release."""
    return (path / MAP_FILE).is_file()


def open_release(path: Path) -> Checkpoint:
    """Opens the tensors of a release in any supported format without reading them.

    Raises:
      CheckpointFileError: as `open_checkpoint`, or a folder of Orbax arrays is incomplete.
    """
    if not is_mapped(path):
        return open_checkpoint(path)
    return MappedFolder(path).checkpoint


class MappedFolder:
    """A folder of Orbax arrays, opened without reading them.

    Attributes:
      arrays: by path, which starts with `params/` or `carried/`.
      steps: the conversion to the release.
      checkpoint: the release.

    Raises:
      CheckpointFileError: it is damaged or incomplete.
    """

    def __init__(self, path: Path):
        stored = read_json(path / MAP_FILE, CheckpointFileError)
        try:
            rules = [_rule(entry) for entry in stored["rules"]]
            arrays = {path: tuple(shape) for path, shape in stored["arrays"].items()}
            shapes = {key: tuple(entry["shape"]) for key, entry in stored["tensors"].items()}
            dtypes = {key: np.dtype(entry["dtype"]) for key, entry in stored["tensors"].items()}
            archive = bool(stored["archive"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointFileError(f"{path / MAP_FILE}: was modified or damaged ({error!r})") from error
        self.arrays = {}
        for part in (PARAMS, CARRIED):
            start = f"{part}/"
            if own := {name.removeprefix(start): shape for name, shape in arrays.items() if name.startswith(start)}:
                opened = open_arrays(path.absolute() / part, own)
                self.arrays |= {start + name: tensor for name, tensor in opened.items()}
        try:
            self.steps = export_plan(rules, arrays)
        except CheckpointMismatch as error:
            raise CheckpointFileError(f"{path / MAP_FILE}: was modified or damaged ({error})") from error
        found = lazy_release(self.steps, self.arrays, dtypes)
        found |= {key: _empty(shape, dtypes[key]) for key, shape in shapes.items() if math.prod(shape) == 0}
        if wrong := sorted(set(shapes.items()) ^ {(key, tensor.shape) for key, tensor in found.items()}):
            keys = ", ".join(key for key, _ in wrong[:8])
            raise CheckpointFileError(f"{path / MAP_FILE}: was modified or damaged: {keys}")
        self.checkpoint = Checkpoint(found, str(path), archive=archive)


def save_mapped(
    folder: epath.Path, steps: Iterable[Step], arrays: Mapping[str, LazyTensor], release: Checkpoint
) -> None:
    """Writes the arrays, and last the map; at most one array is in host memory at a time.

    Args:
      folder: an existing folder, absolute, local or `gs://`.
      steps: of a table whose targets start with `params/` or `carried/`.
      arrays: the converted release, by path.
      release: provides the released keys, shapes and dtypes.

    Raises:
      OSError: there is too little free space.
    """
    steps = tuple(steps)
    depths = {path: len(step.rule.stacked) for step in steps for path in step.targets}
    for part in (PARAMS, CARRIED):
        start = f"{part}/"
        own = {path.removeprefix(start): tensor for path, tensor in arrays.items() if path.startswith(start)}
        if own:
            save_arrays(folder / part, own, {path: depths[start + path] for path in own})
    rules = list({id(step.rule): step.rule for step in steps}.values())
    stored = {
        "archive": release.archive,
        "rules": [_data(rule) for rule in rules],
        "arrays": {path: tensor.shape for path, tensor in arrays.items()},
        "tensors": {key: {"shape": x.shape, "dtype": x.dtype.name} for key, x in release.items()},
    }
    (folder / MAP_FILE).write_text(json.dumps(stored, indent=1) + "\n")


def _data(rule: Rule) -> Fields:
    where = {name: list(values) for name, values in rule.where.items()}
    return {"source": rule.sources, "target": rule.targets, "op": ops.to_data(rule.op), "where": where}


def _rule(data: Config) -> Rule:
    return Rule(tuple(data["source"]), tuple(data["target"]), ops.from_data(data["op"]), dict(data["where"]))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
    """An empty array, which Orbax cannot store."""
    return LazyTensor(shape, dtype, lambda index: np.empty(shape, dtype)[index])
