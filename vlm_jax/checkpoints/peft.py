"""Adapters as `peft` writes them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Names are those of modules of `transformers`' classes: the released keys without `.weight`, renamed where its classes
have other names than their files.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from vlm_jax.adapter import A, B, LoraSettings
from vlm_jax.checkpoints.hub import Checkpoint, CheckpointFileError, LazyTensor, open_checkpoint
from vlm_jax.checkpoints.mismatch import Nearest
from vlm_jax.checkpoints.ops import LINEAR, Shape
from vlm_jax.checkpoints.plan import Step, export_plan
from vlm_jax.checkpoints.rules import Rule
from vlm_jax.config import read_json
from vlm_jax.types import Config, Fields, Selection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, OF_A, OF_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
Names = Sequence[tuple[str, str]]  # (regular expression, replacement) of released keys, applied in order

# Key of adapter_config.json -> its values that mean a plain LoRA.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    # Others change the released weights, which the folder does not have.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclasses.dataclass(frozen=True)
class _Module:
    """The factors of one module, [rank, in] and [out, rank], and the factor of their product."""

    a: LazyTensor
    b: LazyTensor
    scale: float


def module_name(key: str, names: Names) -> str:
    """The module of a released weight in `transformers`' class."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key.removesuffix(".weight")


def with_adapter(checkpoint: Checkpoint, folder: str | os.PathLike[str], names: Names) -> Checkpoint:
    """A release with the products of an adapter added to its weights, in float32, as they are read.

    Args:
      checkpoint: the release.
      folder: written by `peft` or `save_adapter`.
      names: of the release's modules; the adapter may also have those of the released keys.

    Raises:
      CheckpointFileError: missing or damaged files, an adapter of a kind that is not supported, or keys that the
        release does not have or that do not fit; all are named.
    """
    folder = Path(folder)
    modules = _read(folder)
    weights = {key for key in checkpoint if key.endswith(".weight")}
    known = {key.removesuffix(".weight"): key for key in weights} | {module_name(key, names): key for key in weights}
    problems, added, near = [], dict[str, LazyTensor](), Nearest(known)
    for name, module in modules.items():
        if name not in known:
            problems.append(f"{name}: the release has no such weight{near.suggest(name, 'similar module')}")
            continue
        tensor = checkpoint[known[name]]
        product = (module.b.shape[0], module.a.shape[-1]) if len(module.a.shape) == len(module.b.shape) == 2 else None
        if product != tensor.shape or module.a.shape[0] != module.b.shape[1]:
            problems.append(
                f"{name}: expected factors [rank, in] and [out, rank] of {tensor.shape}, found lora_A {module.a.shape} "
                f"and lora_B {module.b.shape}"
            )
            continue
        added[known[name]] = _added(tensor, module)
    _refuse(folder, problems)
    return Checkpoint({**checkpoint, **added}, checkpoint.origin, archive=checkpoint.archive)


def _read(folder: Path) -> dict[str, _Module]:
    """The factors by module."""
    config = read_json(folder / CONFIG, CheckpointFileError)
    wrong = [f"{key}: {config[key]!r}" for key, plain in _PLAIN.items() if key in config and config[key] not in plain]
    if config.get("peft_type") != "LORA" or wrong:
        kinds = "; ".join(wrong) or f"peft_type: {config.get('peft_type')!r}"
        raise CheckpointFileError(
            f"{folder / CONFIG}: only LoRA adapters of linear layers are supported, without DoRA, biases and modules "
            f"saved whole; it has {kinds}. Merge it with peft (merge_and_unload) and load the merged model"
        )
    tensors = open_checkpoint(folder / WEIGHTS)
    found: dict[str, dict[str, LazyTensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in (OF_A, OF_B) if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(PREFIX):
            problems.append(f"{key}: unknown key; expected {PREFIX}MODULE{OF_A} or {OF_B}")
            continue
        found.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})[suffix] = tensor
    problems += [f"{name}: has only one of lora_A and lora_B" for name, pair in found.items() if len(pair) == 1]
    if not found:
        problems.append("it has no factors")
    _refuse(folder, problems)
    return {name: _Module(pair[OF_A], pair[OF_B], _scale(config, name)) for name, pair in found.items()}


def _scale(config: Config, name: str) -> float:
    """alpha / rank of a module; a pattern of the config applies to a module whose name ends with it, as in peft."""

    def of(key: str, patterns: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        return float(config[key])

    try:
        rank, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointFileError(f"{CONFIG}: r and lora_alpha must be numbers, r above 0 ({error!r})") from error


def _added(tensor: LazyTensor, module: _Module) -> LazyTensor:
    def read(index: Selection) -> np.ndarray:
        rows, columns = (slice(None), slice(None)) if index is ... else index
        a, b = (np.asarray(factor[...]).astype(np.float32) for factor in (module.a, module.b))
        return tensor[index].astype(np.float32) + np.float32(module.scale) * (b[rows] @ a[:, columns])

    return LazyTensor(tensor.shape, np.float32, read, by_rows=tensor.by_rows)


def save_adapter(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, np.ndarray],
    settings: LoraSettings,
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    names: Names,
    base: str,
) -> tuple[Path, ...]:
    """Writes a run's adapters for `peft`.

    A module that is several of our kernels has the sum of their ranks; `rank_pattern` and `alpha_pattern` name it.

    Args:
      folder: must not exist, or be empty.
      adapters: factors by path in the part `lora`.
      settings: of the run.
      rules: conversion of the release.
      shapes: of the model's parameters, by path.
      names: of the release's modules.
      base: the release, for `base_model_name_or_path`.

    Returns:
      The files written.

    Raises:
      CheckpointFileError: the folder is not empty, or a kernel is not the weight of a linear module in the release.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointFileError(f"{folder} is not empty: write to another folder")
    kernels = {f"{path.removesuffix(f'/{A}')}/kernel" for path in adapters if path.endswith(f"/{A}")}
    tensors, ranks = dict[str, np.ndarray](), dict[str, int]()
    problems: list[str] = []
    for step in export_plan(rules, shapes):
        if kernels.intersection(step.targets):
            for key, a, b in _released(step, adapters, settings, problems):
                name = module_name(key, names)
                ranks[name] = len(a)
                tensors[f"{PREFIX}{name}{OF_A}"] = np.ascontiguousarray(a, np.float32)
                tensors[f"{PREFIX}{name}{OF_B}"] = np.ascontiguousarray(b, np.float32)
    _refuse(folder, problems)
    power = 0.5 if settings.rslora else 1.0
    others = {name: rank for name, rank in ranks.items() if rank != settings.rank}
    config: Fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: settings.scale * rank**power for name, rank in others.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / CONFIG, folder / WEIGHTS


def _released(
    step: Step, adapters: Mapping[str, np.ndarray], settings: LoraSettings, problems: list[str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(released key, its lora_A, its lora_B) of every tensor that a step's kernels are in."""
    depth = len(step.rule.stacked)
    found = []
    factors = [
        tuple(adapters.get(f"{path.removesuffix('/kernel')}/{name}") for name in (A, B)) for path in step.targets
    ]
    rank = settings.rank * sum(a is not None for a, _ in factors)
    for key, needed in zip(step.rule.sources, step.needed, strict=True):
        if not key.endswith(".weight") or len(needed) != 2:
            fix = "take it out of config.lora.target, or export the run as a whole release"
            problems.append(f"{' + '.join(step.targets)}: {key} {needed} is not the weight of a linear module; {fix}")
            return []
    for position, keys in step.sources.items():
        own = [tuple(None if one is None else one[position].astype(np.float64) for one in pair) for pair in factors]
        if step.rule.op == LINEAR and len(keys) == 1:
            ((a, b),) = own
            assert a is not None and b is not None
            found.append((keys[0], a.T, b.T))
            continue
        products = [
            np.zeros(shape[depth:]) if a is None or b is None else settings.scale * (a @ b)
            for (a, b), shape in zip(own, step.shapes, strict=True)
        ]
        for key, product in zip(keys, step.rule.op.inverse(*products), strict=True):
            found.append((key, *_factors(product, rank, settings.scale)))
    return found


def _factors(product: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B of a product [out, in] of at most `rank`, found as the range of the product.

    Source: Halko, Martinsson and Tropp 2011, algorithm 4.1, which is exact for a product of this rank.
    """
    rank = min(rank, *product.shape)
    sample = product @ np.random.default_rng(0).normal(size=(product.shape[1], rank))
    b, _ = np.linalg.qr(sample)
    return b.T @ product / scale, b


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise CheckpointFileError(
            f"{folder}: the adapter does not fit the release:\n  " + "\n  ".join([*problems[:8], *more])
        )
