"""Chooses the keys of a fine-tuning config that are None: from the release, the data and the devices."""

import dataclasses
import math
import typing
from typing import Any

import jax
import numpy as np

from vlm_jax.adapter import LORA
from vlm_jax.build import Experiment, build_conversational
from vlm_jax.config import ConfigError, RunConfig, parse
from vlm_jax.data.conversations import ConversationSource, Records
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.step import num_shards
from vlm_jax.types import Fields

MEASURED = 4000  # records whose sizes are read, evenly spread
MULTIPLE = 64  # of a row's positions
PACKED_LENGTH, PACKED_SAMPLES = 2048, 8  # a row has room for the longest sample, and for so many positions and samples
POSITIONS = {"cpu": 4096}  # of a device's microbatch
ACCELERATOR_POSITIONS = 8192
BATCH = (8, 128)  # samples of a batch, between these, for about 20 steps an epoch; 128 as LLaVA-1.5
FEWEST_STEPS = 100  # where the number of epochs is not given
EPOCHS = ((100_000, 1), (0, 3))  # by the number of samples
# Learning rate of a model of so many parameters: LLaVA-1.5's for 7B, larger for smaller models, up to a limit.
RATE, PARAMS, POWER, HIGHEST_RATE = 2e-5, 7e9, 0.4, 2e-3
LORA_RATE = 10.0  # times that of parameters
HELD_OUT, MAX_HELD_OUT = 0.05, 200  # share and number of records of the evaluation
PROVISIONAL = 1 << 20


@dataclasses.dataclass(frozen=True)
class Measured:
    """What samples take of a row.

    Attributes:
      count: samples to train on.
      complete: whether all were measured.
      length, images, pictures: (mean, maximum) of positions, tiles or places of patches, and pictures of a sample.
    """

    count: int
    complete: bool
    length: tuple[float, int]
    images: tuple[float, int]
    pictures: tuple[float, int]


class Choice:
    """A config whose keys are chosen where they are None.

    Attributes:
      config: with the keys so far.
      chosen: what was chosen, by path.
    """

    def __init__(self, config: RunConfig):
        self.config, self.chosen = config.copy_and_resolve_references(), dict[str, object]()

    def __call__(self, path: str, value: object) -> Any:
        """The key's value, which is `value` where it was None."""
        *sections, key = path.split(".")
        section = self.config
        for name in sections:
            section = section[name]
        if section[key] is None:
            with self.config.unlocked():
                section[key] = value
            self.chosen[f"config.{path}"] = value
        return section[key]


def completed(config: RunConfig, *, epochs: float | None = None) -> tuple[RunConfig, dict[str, object]]:
    """A config of a release with all keys, and those that were chosen, by path.

    The same release, data and devices give the same values, so that the same command resumes a run; on other devices
    after `as_before`.

    Args:
      config: of `finetuning.get_config`, or with the same keys; values that are given stay.
      epochs: of the training data, where `steps` is None; chosen by the number of samples when None.

    Raises:
      ConfigError, MalformedRecords: as `build` and `Experiment.open_source`.
    """
    if not is_incomplete(config):
        return config, {}
    if config.data.train_path is None and not config.data.mixture:
        raise ConfigError("config.data.train_path: expected the file to train on, got None; pass --data=FILE")
    choose, on_cpu = Choice(config), jax.default_backend() == "cpu"
    choose("param_dtype", choose("dtype", "float32" if on_cpu else "bfloat16"))
    choose("evaluation.batch_size", 8 if on_cpu else 16)
    experiment = build_conversational(_provisional(choose.config))
    files = _training_files(experiment)
    count = sum(map(len, files))
    if config.data.evaluation_path is not None:
        choose("data.held_out", 0)
    count -= choose("data.held_out", min(MAX_HELD_OUT, math.ceil(count * HELD_OUT)))
    found = measured(experiment, files, count)
    samples_per_row = _choose_row(choose, found)
    _choose_stage(choose, found.count, samples_per_row, epochs)
    rate = min(HIGHEST_RATE, RATE * (PARAMS / sum(experiment.num_params().values())) ** POWER)
    label = config.schedule[0]
    _choose_rates(choose, label, rate)
    _choose_remat(choose, experiment)
    return choose.config, choose.chosen


def as_before(config: RunConfig, before: Fields) -> RunConfig:
    """A config whose keys that `completed` chooses by the devices are those of the run's last start where it is None.

    Args:
      config: as of `completed`.
      before: of the last start, in the run's folder.
    """
    if not is_incomplete(config):
        return config
    choose, stage = Choice(config), f"stages.{config.schedule[0]}"
    for path in ("dtype", "param_dtype", "evaluation.batch_size", f"{stage}.batch_size", f"{stage}.accumulate"):
        value: Any = before
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            choose(path, value)
    return choose.config


def _choose_rates(choose: Choice, label: str, rate: float) -> None:
    """Rates of the parts, or with `config.lora` of the adapters alone, larger as in LLaVA; given ones stay."""
    rates = choose.config.stages[label].learning_rates
    lora = bool(choose.config.lora.rank)
    with choose.config.unlocked():
        for part in [part for part, value in rates.items() if value is None and (part == LORA) != lora]:
            del rates[part]
    chosen = min(HIGHEST_RATE, rate * (LORA_RATE if lora else 1))
    for part in rates:
        choose(f"stages.{label}.learning_rates.{part}", float(f"{chosen:.1e}"))


def _choose_remat(choose: Choice, experiment: Experiment) -> None:
    """What is stored for the backward pass, as in `configs/base.py`; least of the tower, which is frozen by default."""
    model = experiment.system.model
    for part, module, policy in (("encoder", model.encoder, "full"), ("decoder", model.decoder, "dots")):
        if "remat" in typing.get_type_hints(type(module)):
            choose(f"{part}.remat", policy)


def is_incomplete(config: RunConfig) -> bool:
    """Whether a config of a release has keys to choose."""
    if config.release is None or config.data.kind != "conversations" or len(config.schedule) != 1:
        return False
    if "length" not in config.row or "held_out" not in config.data:  # two towers, or a config that is complete
        return False
    stage = config.stages.get(config.schedule[0])
    if stage is None or not {"images", "batch_size", "learning_rates"} <= {*config.row, *config.evaluation, *stage}:
        return False  # a key without a default is missing, which `build` or the trainer says
    sections = (config.row.length, config.row.images, config.dtype, config.param_dtype, config.evaluation.batch_size)
    keys = ("steps", "batch_size", "warmup_steps", "accumulate")
    of_stage = [stage[key] for key in keys if key in stage]
    return None in (*sections, config.data.held_out, *of_stage, *stage.learning_rates.values())


def _provisional(config: RunConfig) -> RunConfig:
    """A config that can be built before anything is measured."""
    made = config.copy_and_resolve_references()
    with made.unlocked():
        made.row.update({"length": PROVISIONAL, "images": PROVISIONAL, "pictures": config.row.pictures or 1})
        made.data.held_out = int(config.data.evaluation_path is None)
        made.schedule = ()  # rates are not chosen yet
    return made


def _training_files(experiment: Experiment) -> list[Records]:
    """The records to learn, with those that are held out."""
    source = experiment.open_source()
    assert isinstance(source, ConversationSource)
    files = [records for records, _ in source.trained.values()]
    return [*files, source.evaluation_records] if source.settings.held_out else files


def measured(experiment: Experiment, files: list[Records], count: int) -> Measured:
    """Measures samples of files, evenly spread; pictures are not decoded.

    Args:
      experiment: its processor measures.
      files: of the training data.
      count: samples to train on.
    """
    total, loads = sum(map(len, files)), []
    for records in files:
        share = max(1, MEASURED * len(records) // total)
        indices = range(len(records)) if len(records) <= share else np.linspace(0, len(records) - 1, share).astype(int)
        sizes = [records.sizes(int(index)) for index in indices]
        loads += [experiment.measure(one) for one in sizes if one is not None]
    if not loads:
        raise ConfigError("config.data: no record has a readable image")
    columns = [[getattr(load, key) for load in loads] for key in ("length", "images", "pictures")]
    return Measured(count, total <= MEASURED, *((float(np.mean(column)), max(column)) for column in columns))


def _choose_row(choose: Choice, found: Measured) -> float:
    """Chooses the shape of rows; returns how many samples share one."""
    row, spare = choose.config.row, 1.0 if found.complete else 1.25  # longer ones may be among those not measured
    (mean, longest), (mean_images, most_images), (mean_pictures, most_pictures) = (
        found.length,
        found.images,
        found.pictures,
    )
    least = math.ceil(longest * spare / MULTIPLE) * MULTIPLE
    packed = min(PACKED_LENGTH, math.ceil(PACKED_SAMPLES * mean / MULTIPLE) * MULTIPLE) if row.pack else 0
    length = choose("row.length", max(least, packed))
    samples = max(1.0, 0.9 * length / mean) if row.pack else 1.0
    places = max(most_images * spare, 1.2 * samples * mean_images, 1)
    choose("row.images", math.ceil(places / MULTIPLE) * MULTIPLE if places > MULTIPLE else math.ceil(places))
    if choose.config.reducer.kind != "none":
        choose("row.pictures", math.ceil(max(most_pictures * spare, 1.2 * samples * mean_pictures, 1)))
    return samples


def _choose_stage(choose: Choice, count: int, samples_per_row: float, epochs: float | None) -> None:
    """Chooses batches and steps."""
    label = choose.config.schedule[0]
    mesh = make_mesh(parse(MeshSettings, choose.config.mesh, "config.mesh"))
    shards, platform = num_shards(mesh), mesh.devices.flat[0].platform
    samples = min(BATCH[1], max(BATCH[0], 2 ** int(math.log2(max(1, count // 20)))))
    rows = max(1, round(samples / samples_per_row / shards))  # of a device
    micro = max(1, POSITIONS.get(platform, ACCELERATOR_POSITIONS) // choose.config.row.length)
    parts = choose.config.stages[label].accumulate or math.ceil(rows / micro)
    rows = shards * parts * math.ceil(rows / parts)
    batch_size = choose(f"stages.{label}.batch_size", rows)
    choose(f"stages.{label}.accumulate", parts if batch_size == rows else 1)
    per_step = batch_size * samples_per_row
    of_epochs = next(number for least, number in EPOCHS if count >= least) if epochs is None else epochs
    steps = math.ceil(of_epochs * count / per_step)
    steps = choose(f"stages.{label}.steps", max(2, steps, FEWEST_STEPS if epochs is None else 0))
    choose(f"stages.{label}.warmup_steps", min(max(1, round(0.03 * steps)), steps - 1))
