"""python -m vlm_jax.cli.train --release=FOLDER --data=FILE --workdir=DIR [--export=FOLDER] [--config.KEY=VALUE …]

Fine-tunes a release, or runs any config: --config=configs/X.py --workdir=DIR [--init_from=DIR].
"""

import pathlib
from typing import Any

import jax
from absl import flags

from vlm_jax.build import AnyExperiment, build
from vlm_jax.checkpoints.saving import check_vacant
from vlm_jax.cli import command, numbers
from vlm_jax.cli.progress import open_progress
from vlm_jax.config import ConfigError, RunConfig, parse, read_json
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.paths import absolute
from vlm_jax.ranges import Positive
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train import finetuning
from vlm_jax.train.check import check_config
from vlm_jax.train.first_run import as_before, completed
from vlm_jax.train.loop import Trainer
from vlm_jax.train.workdir import CONFIG_FILE

RELEASE = flags.DEFINE_string(
    "release", None, "The released folder, or organisation/name on the Hugging Face hub, to fine-tune; config.release."
)
DATA = flags.DEFINE_string(
    "data", None, "A file of conversations: LLaVA's JSON, JSONL, parquet, …; config.data.train_path."
)
EVALUATION_DATA = flags.DEFINE_string(
    "evaluation_data", None, "Another such file to evaluate on; a part of --data is held out if unset."
)
EPOCHS = numbers.define(
    "epochs", Positive, None, "How often each sample is learned; by the number of samples if unset."
)
EXPORT = flags.DEFINE_string(
    "export", None, "A folder to write at the end: the release with the trained parameters, for cli.generate."
)
INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Initial parameters of the parts of the model: a folder that cli.convert wrote, or the workdir of another run or "
    "its checkpoints.",
)


def configured() -> tuple[Any, dict[str, object]]:
    """The config with the values of the flags, and what was chosen for the keys that are None."""
    config = command.CONFIG.value
    given = {"release": RELEASE.value, "data.train_path": DATA.value, "data.evaluation_path": EVALUATION_DATA.value}
    with config.unlocked():
        for path, value in given.items():
            *sections, key = path.split(".")
            section = config[sections[0]] if sections else config
            if value is not None and key not in section:
                raise ConfigError(f"config.{path}: the config has no such key; omit --{flag_of(path)}")
            if value is not None:
                section[key] = value
    if config.release is None and command.config_path() == finetuning.__file__:
        raise ConfigError("--release: expected the released folder to fine-tune, or a --config, got neither")
    check_config(config, unset=True)
    config, chosen = completed(_as_before(config), epochs=EPOCHS.value)
    check_config(config)
    return config, chosen


def _as_before(config: RunConfig) -> RunConfig:
    """As `first_run.as_before`, by the file of a run that resumes."""
    path = command.workdir() / CONFIG_FILE
    if not path.exists():
        return config
    try:
        return as_before(config, read_json(path, ConfigError))
    except ConfigError:  # a file that is damaged; `Claim` says so
        return config


def flag_of(path: str) -> str:
    """The flag that sets a key."""
    return {"release": "release", "data.train_path": "data"}.get(path, "evaluation_data")


def main() -> None:
    """Trains every stage of a config, and evaluates on the way and at the end; see `train.loop.Trainer`."""
    config, chosen = configured()
    workdir = command.workdir()
    with open_progress() as progress:
        progress.say([f"chosen: --{path}={value}" for path, value in chosen.items()])
        experiment = build(config)
        check_export(experiment)
        mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"))
        start: Any = {"init_from": INIT_FROM.value, "init_parts": experiment.parts}
        told: Any = {"progress": progress, "evaluator": evaluator_of(experiment, config), "tell": progress.tell}
        outcome = Trainer(config, experiment, mesh, workdir, **start, **told).run()
        if EXPORT.value is not None:
            folder = absolute(EXPORT.value)
            experiment.system.save_pretrained(folder, outcome.params)
            progress.say([f"{folder}: the release with the trained parameters"])


def check_export(experiment: AnyExperiment) -> None:
    """Checks, before the training, that `--export` can be written.

    Raises:
      ConfigError: the run has no release, a part of another kind, or several processes.
      CheckpointFileError: the folder has a checkpoint.
    """
    if EXPORT.value is None:
        return
    release = experiment.system.release
    if release is None:
        raise ConfigError("--export: a run without config.release has no released format; omit the flag")
    if release.unnamed:
        parts = " and ".join(release.unnamed)
        raise ConfigError(f"--export: the release has no names for another {parts}; omit the flag")
    if jax.process_count() > 1:
        raise ConfigError("--export: of several processes none has all parameters; use cli.convert --run afterwards")
    check_vacant(pathlib.Path(absolute(EXPORT.value)))


if __name__ == "__main__":
    command.run(main, default_config=finetuning.__file__)
