"""A small release that is made in a minute, for where no model hub is in reach, or no accelerator."""

import logging
import os
import pathlib
import tempfile

from vlm_jax.build import build
from vlm_jax.checkpoints.hub import CheckpointFileError, fetch
from vlm_jax.config import parse
from vlm_jax.data.squares import COLOURS, PLACES, write_squares
from vlm_jax.paths import absolute
from vlm_jax.pretrained.small import write_small_release
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train import finetuning
from vlm_jax.train.first_run import completed
from vlm_jax.train.loop import Trainer

FOLDER = "~/.cache/vlm_jax/small-release"
PICTURES, STEPS, BATCH_SIZE = 2048, 480, 16
LEARNING_RATE = 1.2e-3
_CORNERS = tuple(str(place * 1000 // PLACES) for place in range(1, PLACES + 1))
WORDS = (*COLOURS, *_CORNERS, "USER", "ASSISTANT", "What", "Which", "Where", " colour", " is", " the", " square")


def make_small_release(
    folder: str | os.PathLike[str], *, pictures: int = PICTURES, steps: int = STEPS, seed: int = 0
) -> pathlib.Path:
    """Draws pictures of a coloured square, and trains a LLaVA of three layers to say its colour and its place.

    Args:
      folder: that the release is written to; one that has a release stays as it is.
      pictures: that are learned from, see `data.squares`.
      steps: optimizer steps of 16 pictures.
      seed: of the weights, of the pictures and of their order.

    Returns:
      The folder, for `from_pretrained`, `--checkpoint` and `--release`. It appears once it is whole.
    """
    folder = pathlib.Path(absolute(folder))
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        made = pathlib.Path(name)
        config = finetuning.get_config()
        config.seed = seed
        config.release = str(write_small_release(made / "random", words=WORDS, seed=seed))
        config.data.train_path = str(write_squares(made, pictures, seed=seed))
        config.data.tasks = ("colour", "place")
        config.row.pack = False
        stage = config.stages.instruction
        stage.steps, stage.batch_size, stage.warmup_steps = steps, BATCH_SIZE, max(1, steps // 20)
        stage.learning_rates.update(dict.fromkeys(("encoder", "connector", "decoder"), LEARNING_RATE))
        config, _ = completed(config)
        experiment = build(config)
        mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"))
        outcome = Trainer(config, experiment, mesh, made / "run", init_parts=experiment.parts).run()
        experiment.system.save_pretrained(made / "release", outcome.params)
        (made / "release").rename(folder)
    return folder


def hub_or_small(name: str, *, folder: str | os.PathLike[str] = FOLDER) -> str:
    """The name of a release on the Hugging Face hub where it can be downloaded, else a folder of a small one.

    Args:
      name: `organisation/name`; it is downloaded, unless it is in the hub's cache.
      folder: of the small release, which is made where it is missing.

    Returns:
      What `from_pretrained`, `--checkpoint` and `--release` take.
    """
    try:
        fetch(name)
        return name
    except CheckpointFileError as error:
        logging.getLogger("vlm_jax").info("%s; a small release is taken in its place", error)
    return str(make_small_release(folder))
