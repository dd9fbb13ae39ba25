"""The config of a plan: a run's config, with keys that are None chosen without data."""

import math
import pathlib
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build import AnyExperiment, Experiment, build, of_system
from vlm_jax.build.sections import check_model
from vlm_jax.config import ConfigError, RunConfig, did_you_mean
from vlm_jax.decoders.mixed import MixedTransformer
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.paths import absolute
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.budgets import budgeted_views
from vlm_jax.pretrained.known import known_configs
from vlm_jax.pretrained.known_system import known_system
from vlm_jax.pretrained.loader import DTYPES, open_system
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.views import Views
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.system import System
from vlm_jax.train.first_run import Choice
from vlm_jax.types import Fields

LENGTH = 2048  # positions of a row, where none is given
VISUAL_SHARE = 4  # at most one of so many positions is a visual token, where no budget is given
PROVISIONAL = 1 << 16
# (height, width) of pictures in pixels, of several shapes: one that takes the most tokens is among them.
LARGE = tuple((round(4096 * part), 4096) for part in sorted({i / j for j in range(1, 13) for i in range(1, j + 1)}))
STEPS, WARMUP = 1000, 30  # of a stage; no shape depends on them


def planned(config: RunConfig, num_devices: int, *, pictures: int = 1) -> tuple[RunConfig, AnyExperiment]:
    """A config with all keys, and its experiment; no data and no weight is read.

    Args:
      config: of a run, or of `train.finetuning.get_config`; a release is one of `known_configs`, a folder, or a name
        on the hub.
      num_devices: of the slice.
      pictures: of a row, where `config.row.images` is None.

    Raises:
      ConfigError, InfeasibleBudget: as `build`.
    """
    choose = Choice(config)
    own = choose.config
    if own.release is None:
        return own, build(own)
    with own.unlocked():
        _choose(choose, num_devices)
        system = _system(own)
        for part in remat_parts(system.model) if isinstance(system.model, VLM) else ():
            choose(f"{part}.remat", "full")
        if "images" in own.row and own.row.images is None:
            own.row.images = PROVISIONAL
            experiment = of_system(own, system)
            if isinstance(experiment, Experiment) and isinstance(experiment.system.processor.views, MosaicViews):
                choose("row.pictures", pictures)  # wholes are padded apart from tiles
            own.row.images = _images(experiment, own, pictures)
    return own, of_system(own, system)


def remat_parts(model: nn.Module) -> tuple[str, ...]:
    """Sections of the config whose module has a remat policy."""
    parts: dict[str, object] = {}
    if isinstance(model, VLM):
        parts = {"encoder": model.encoder, "decoder": model.decoder}
    elif isinstance(model, TwoTower):
        parts = {"encoder": model.image, "decoder": model.text}
    elif isinstance(model, Classifier):
        parts = {"encoder": model.encoder}
    return tuple(part for part, module in parts.items() if "remat" in typing.get_type_hints(type(module)))


def visible_share(model: nn.Module, length: int) -> float:
    """Share of all pairs of positions that a decoder's causal mask and windows leave, on average over its blocks.

    Args:
      model: another model than a `VLM` has every pair.
      length: positions of a row.
    """
    if not isinstance(model, VLM) or model.decoder is None:
        return 1.0
    windows = model.decoder.windows if isinstance(model.decoder, MixedTransformer | Transformer) else ()
    sizes = [length if window is None else min(window, length) for window in windows or (None,)]
    pairs = [size * (size + 1) / 2 + (length - size) * size for size in sizes]
    return sum(pairs) / len(pairs) / length**2


def has_experts(system: System) -> bool:
    """Whether any parameter has an axis of experts."""
    boxed: Any = jax.tree.leaves(system.boxed_shapes(), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    return any(isinstance(leaf, nn.LogicallyPartitioned) and axes.EXPERT in leaf.names for leaf in boxed)


def _choose(choose: Choice, num_devices: int) -> None:
    own = choose.config
    choose("param_dtype", choose("dtype", "bfloat16"))
    if "held_out" in own.data:
        if own.data.evaluation_path is None and not own.data.held_out:
            own.data.evaluation_path = "evaluation.json"
        choose("data.held_out", 0)
    if "length" in own.row:
        choose("row.length", LENGTH)
        if own.reducer.get("kind") not in (None, "none"):
            choose("row.pictures", 1)
    choose("evaluation.batch_size", 8)
    mesh = MeshSettings(**own.mesh.to_dict())
    rest = math.prod(size for size in (mesh.tensor, mesh.context, mesh.expert) if size != -1)
    for label in own.schedule:
        accumulate = choose(f"stages.{label}.accumulate", 1)
        choose(f"stages.{label}.batch_size", max(1, num_devices // rest) * accumulate)
        choose(f"stages.{label}.steps", STEPS)
        choose(f"stages.{label}.warmup_steps", min(WARMUP, own.stages[label].steps - 1))
        for part in own.stages[label].learning_rates:
            if part != "lora" or own.lora.rank:
                choose(f"stages.{label}.learning_rates.{part}", 1e-5)
        if not own.lora.rank and "lora" in own.stages[label].learning_rates:
            del own.stages[label].learning_rates["lora"]


def _system(config: RunConfig) -> System:
    """The system of an included config, or of a folder."""
    if _is_elsewhere(config.release):
        return open_system(config.release, FAMILIES, dtype=config.dtype, param_dtype=config.param_dtype)
    check_model(config, unset=True)
    return known_system(config.release, dtype=DTYPES[config.dtype], param_dtype=DTYPES[config.param_dtype])


def _is_elsewhere(name: str) -> bool:
    """Whether a release is a folder, and not one of the included configs.

    Raises:
      ConfigError: it is neither, since a plan downloads no weights.
    """
    if name in known_configs():
        return False
    if pathlib.Path(absolute(name)).exists():
        return True
    raise ConfigError(
        f"--release: expected a folder, or an included config, got '{name}'{did_you_mean(name, known_configs())}"
    )


def _images(experiment: AnyExperiment, config: RunConfig, pictures: int) -> int:
    """Tiles, or places of patches, for so many large pictures of a row."""
    assert isinstance(experiment, Experiment)
    views = experiment.system.processor.views
    if config.token_budget is None:
        views = _bounded(views, config.row.length // VISUAL_SHARE // pictures)
    found = [(len(views.layouts([size])[0]), views.loads([size])[0]) for size in LARGE]  # one image a conversation
    most = max(tokens for tokens, _ in found)
    return pictures * min(load for tokens, load in found if tokens == most)


def _bounded(views: Views, room: int) -> Views:
    """The views with at most `room` tokens of an image, or with little more than the fewest that one takes."""
    while True:
        try:
            return budgeted_views(views, room)
        except InfeasibleBudget:
            room += 1 + room // 16


def details(config: RunConfig, experiment: AnyExperiment) -> Fields:
    """What describes a plan for readers."""
    found: dict[str, Any] = {"release": config.release, "token_budget": config.token_budget}
    found |= {"reducer": config.reducer.get("kind"), "connector": config.connector.get("kind")}
    if isinstance(experiment, Experiment):
        found |= {"length": experiment.row.length, "images": experiment.row.images}
    model = experiment.system.model
    if isinstance(model, VLM):
        found["remat"] = {part: config[part].get("remat") for part in ("encoder", "decoder")}
    found["dtype"] = str(jnp.dtype(DTYPES[config.dtype]))
    found["num_params"] = sum(experiment.num_params().values())
    return found
