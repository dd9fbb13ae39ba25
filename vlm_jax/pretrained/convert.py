"""Conversion of released folders to Orbax arrays and back."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors
from etils import epath
from flax import linen as nn

from vlm_jax.adapter import LORA
from vlm_jax.checkpoints.arrays import check_space
from vlm_jax.checkpoints.hub import PARAMS, Checkpoint, CheckpointFileError, LazyTensor, fetch
from vlm_jax.checkpoints.lazy import cast, lazy_params, lazy_release
from vlm_jax.checkpoints.mapped import CARRIED, MappedFolder, is_mapped, open_release, save_mapped
from vlm_jax.checkpoints.orbax import CHECKPOINTS, newest_state
from vlm_jax.checkpoints.peft import save_adapter
from vlm_jax.checkpoints.plan import Step, plan
from vlm_jax.checkpoints.rules import Rule, matching, prefixed
from vlm_jax.checkpoints.runs import open_adapters, open_run
from vlm_jax.checkpoints.saving import copy_companions, save_archive, save_checkpoint
from vlm_jax.checkpoints.verification import check_stored, stored_shapes
from vlm_jax.config import read_json
from vlm_jax.leaves import flatten
from vlm_jax.paths import absolute, is_remote
from vlm_jax.pretrained.big_vision_paligemma import completed
from vlm_jax.pretrained.family import Description, Family, marker
from vlm_jax.pretrained.loader import DTYPES, choose_family
from vlm_jax.pretrained.module_names import MODULE_NAMES
from vlm_jax.pretrained.named_tower import with_named_tower
from vlm_jax.pretrained.recognition import check_tensors, recognised
from vlm_jax.types import Config, Dtype, Fields

RUN_PARTS = ("encoder", "connector", "decoder")  # parts of every run
LEARNED_ROWS = "learned_rows"  # a part of runs whose `config.release` has it


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The planned conversion of a folder to the other format; no tensor is read before `write`.

    Attributes:
      folder: folder of the source.
      to_orbax: whether it is converted to Orbax arrays, or to the released files.
      release: the released tensors.
      cast: the same in the requested dtypes.
      arrays: the Orbax arrays, by path.
      steps: the conversion between the two.
      remarks: text for the printed line of an array, by path, or of a tensor without an array, by key.
      config: content of `config.json` instead of the source's; None for the source's own.
      of_run: whether the arrays are a run's.
    """

    folder: Path
    to_orbax: bool
    release: Checkpoint
    cast: Checkpoint
    arrays: Mapping[str, LazyTensor]
    steps: tuple[Step, ...]
    remarks: Mapping[str, str]
    config: Config | None = None
    of_run: bool = False

    @property
    def direction(self) -> str:
        """The source and target formats, for printing."""
        if self.to_orbax:
            return "Hugging Face -> Orbax"
        return "run -> Hugging Face" if self.of_run else "Orbax -> Hugging Face"

    @property
    def total(self) -> str:
        """Counts of tensors, parameters and bytes; parameters that are stored under two keys count once."""
        params = {path: tensor for path, tensor in self.arrays.items() if path.startswith(f"{PARAMS}/")}
        count = sum(math.prod(tensor.shape) for tensor in params.values())
        made = sum(len(keys) for step in self._steps_of_params() for keys in step.sources.values())
        size = sum(tensor.nbytes for tensor in (self.arrays if self.to_orbax else self.cast).values())
        return (
            f"{len(self.release)} released tensors, {len(params)} arrays of {count:,} parameters, "
            f"{len(self.release) - made} without a parameter, {size:,} bytes"
        )

    def _steps_of_params(self) -> list[Step]:
        return [step for step in self.steps if step.targets[0].startswith(f"{PARAMS}/")]

    def ways(self) -> Iterator[str]:
        """One line per released tensor, in the order of the keys."""
        lines = {}
        for step in self.steps:
            for position, keys in step.sources.items():
                for i, key in enumerate(keys):
                    number = f" ({i + 1} of {len(keys)})" if len(keys) > 1 else ""
                    lines[key] = self._way(step, position, self._released(key) + number)
        for key in self.release:
            yield lines.get(key) or self._released(key) + self.remarks.get(key, ": is empty; only its shape is stored")

    def _way(self, step: Step, position: tuple[int, ...], released: str) -> str:
        entry = f"[{', '.join(map(str, position))}]" if position else ""
        ours = " + ".join(
            f"{path}{entry} {self.arrays[path].shape} {self.arrays[path].dtype}{self.remarks.get(path, '')}"
            for path in step.targets
        )
        op = step.rule.op if self.to_orbax else step.rule.op.inverse
        return f"{released} -> {op} -> {ours}" if self.to_orbax else f"{ours} -> {op} -> {released}"

    def _released(self, key: str) -> str:
        tensor = (self.release if self.to_orbax else self.cast)[key]
        return f"{key} {tensor.shape} {tensor.dtype}"

    def write(self, target: epath.PathLike) -> None:
        """Writes the folder in the other format, tensor by tensor.

        Args:
          target: a folder that does not exist or is empty; may be `gs://` for Orbax arrays.

        Raises:
          CheckpointFileError: the target exists, or cannot be written; it is then removed.
        """
        if not self.to_orbax and is_remote(target):
            raise CheckpointFileError(f"{target}: released files are written to a local folder; pass one")
        with _whole_folder(target) as folder:
            if self.config is not None:
                (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            copy_companions(self.folder, folder)
            if self.to_orbax:
                save_mapped(folder, self.steps, self.arrays, self.cast)
            else:
                check_space(folder / "model", sum(tensor.nbytes for tensor in self.cast.values()))
                (save_archive if self.cast.archive else save_checkpoint)(Path(folder), self.cast)


def open_conversion(
    source: str | os.PathLike[str],
    families: Mapping[str, Family],
    *,
    dtype: str | None = None,
    run: epath.PathLike | None = None,
) -> Conversion:
    """Detects the format of a folder and plans its conversion to the other format.

    No tensor is read, except a head that is stored in addition to the table to which the config ties it:
    the number of parameters depends on whether the two are equal.

    Args:
      source: a released folder or file, `organisation/name` on the Hugging Face hub, or a folder of Orbax
        arrays converted from one.
      families: the registration table.
      dtype: dtype of floating-point tensors, a key of `DTYPES`; as stored when None.
      run: the workdir of a run of the model of `source`, whose newest parameters are written as a release;
        other tensors are those of `source`.

    Raises:
      CheckpointError: there is no such run, or it is of another model.
      CheckpointFileError, CheckpointMismatch, PretrainedError: as `from_pretrained`.
    """
    path = fetch(source)
    wanted = None if dtype is None else DTYPES[dtype]
    if run is not None:
        return _of_run(path, families, epath.Path(absolute(run)), wanted)
    if is_mapped(path):
        mapped = MappedFolder(path)
        release = mapped.checkpoint
        return Conversion(path, False, release, _cast(release, wanted), mapped.arrays, mapped.steps, {})
    folder, config, release, description = _described(path, families)
    steps, remarks = _all_steps(description, release)
    arrays = lazy_params(steps, release, dtype=wanted)
    return Conversion(folder, True, release, _cast(release, wanted), arrays, steps, remarks, config)


def _described(path: Path, families: Mapping[str, Family]) -> tuple[Path, Fields | None, Checkpoint, Description]:
    """The folder, its config where it differs from the file's, its tensors, and their description."""
    folder = path if path.is_dir() else path.parent
    path, own = recognised(path, None)
    family = choose_family(own, families)
    config, release = with_named_tower(own, open_release(path), folder)
    config = completed(config, release)
    check_tensors(config, release, folder)
    description = family(config, release, dtype=jnp.float32, param_dtype=jnp.float32)
    return folder, None if config == own else config, release, description


def _of_run(path: Path, families: Mapping[str, Family], workdir: epath.Path, dtype: Dtype) -> Conversion:
    """Converts a run's parts to a release: the other tensors, and dtypes, are those of the release at `path`."""
    folder, config, release, description = _described(path, families)
    shapes = nn.meta.unbox(description.boxed_shapes())
    steps = plan(prefixed(description.rules, target=f"{PARAMS}/"), release, {PARAMS: shapes}, ignore=description.ignore)
    state = newest_state(workdir / CHECKPOINTS)
    has_rows = any(name.startswith(f"{PARAMS}/{LEARNED_ROWS}/") for name in stored_shapes(state))
    parts = (*RUN_PARTS, LEARNED_ROWS) if has_rows else RUN_PARTS
    steps = tuple(step for step in steps if step.targets[0].split("/")[1] in parts)
    wanted = {target: shape for step in steps for target, shape in zip(step.targets, step.shapes, strict=True)}
    check_stored(state, wanted, [f"{PARAMS}/{part}" for part in parts])
    arrays = open_run(workdir / CHECKPOINTS, {path.removeprefix(f"{PARAMS}/"): shape for path, shape in wanted.items()})
    arrays = {f"{PARAMS}/{path}": tensor for path, tensor in arrays.items()}
    made = lazy_release(steps, arrays, {key: tensor.dtype for key, tensor in release.items()})
    whole = Checkpoint({**release, **made}, release.origin, archive=release.archive)
    remarks = {key: f": as in {path}" for key in release if key not in made}
    return Conversion(folder, False, whole, _cast(whole, dtype), arrays, steps, remarks, config, of_run=True)


def write_adapter(
    source: str | os.PathLike[str], families: Mapping[str, Family], run: epath.PathLike, target: str | os.PathLike[str]
) -> tuple[Path, ...]:
    """Writes the adapters of a run of `source` as a folder of `peft`; see `checkpoints.peft.save_adapter`.

    Raises:
      CheckpointError: the run has no adapters.
      CheckpointFileError: it trained other parameters too, or an adapter has no linear module in the release.
    """
    path, workdir = fetch(source), epath.Path(absolute(run))
    config = read_json(workdir / "config.json", CheckpointFileError)
    if config.get("init_from") is not None:
        raise CheckpointFileError(
            f"{workdir}: this run started from {config['init_from']}, whose parameters an adapter folder does not "
            "have; export it whole"
        )
    patterns = [one for stage in config["stages"].values() for one in stage["learning_rates"].items()]
    if others := [pattern for pattern, rate in patterns if rate and pattern.split("/")[0] != LORA]:
        raise CheckpointFileError(
            f"{workdir}: this run also trained {', '.join(others)}, which an adapter folder does not have; export "
            "it whole"
        )
    adapters, settings = open_adapters(workdir / CHECKPOINTS)
    _, changed, _, description = _described(path, families)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(nn.meta.unbox(description.boxed_shapes()))}
    names = MODULE_NAMES.get(marker(changed or recognised(path, None)[1]), ())
    base = str(source) if not Path(source).exists() else str(Path(source).resolve())
    return save_adapter(absolute(target), adapters, settings, description.rules, shapes, names, base)


def _cast(release: Checkpoint, dtype: Dtype) -> Checkpoint:
    tensors = {key: cast(tensor, dtype) for key, tensor in release.items()}
    return Checkpoint(tensors, release.origin, archive=release.archive)


def _all_steps(description: Description, release: Checkpoint) -> tuple[tuple[Step, ...], dict[str, str]]:
    """The steps of all non-empty tensors, including those that the module ignores, and remarks on the arrays."""
    boxed = description.boxed_shapes()
    shapes = nn.meta.unbox(boxed)
    read = {
        key
        for step in plan(description.rules, release, shapes, ignore=description.ignore)
        for keys in step.sources.values()
        for key in keys
    }
    others = [key for key, tensor in release.items() if key not in read and math.prod(tensor.shape)]
    rules = (*prefixed(description.rules, target=f"{PARAMS}/"), *(Rule(key, f"{CARRIED}/{key}") for key in others))
    targets: Fields = {PARAMS: shapes, CARRIED: {key: release[key] for key in others}}
    steps = plan(rules, release, targets, ignore=description.ignore)
    remarks = {f"{CARRIED}/{key}": f" (ignored: {matching(description.ignore, key)})" for key in others}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(boxed, is_leaf=_is_box)[0]:
        if _is_box(leaf):
            names = ", ".join(str(name) for name in leaf.names)
            remarks["/".join((PARAMS, *(str(part.key) for part in keys)))] = f" [{names}]"
    return steps, remarks


def _is_box(leaf: object) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


@contextlib.contextmanager
def _whole_folder(target: epath.PathLike) -> Iterator[epath.Path]:
    """A temporary folder that is renamed when all is written, or removed on an error.

    In a bucket nothing is renamed; there the file that is written last marks the folder as complete.
    """
    target = epath.Path(absolute(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointFileError(f"{target} exists; pass another --target, or remove it")
    remote = is_remote(target)
    made = [] if remote else [parent for parent in target.parents if not parent.exists()]
    folder = target if remote else target.with_name(f".{target.name}.{os.getpid()}.incomplete")
    try:
        folder.mkdir(parents=True)
        yield folder
        if not remote:
            if target.exists():
                target.rmdir()
            folder.rename(target)
    except BaseException as error:
        if folder.exists():
            folder.rmtree()
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise CheckpointFileError(
                f"{target}: could not be written, and was removed ({error}); free space, fix the "
                "permissions, or pass another --target"
            ) from error
        raise
