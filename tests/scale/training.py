"""Trains small releases on pictures from files, one run after another: `python -m tests.scale.training JOB [WHERE]`.

JOB is the JSON of a list of the arguments of `train`. WHERE is the number of processes, the index of this one and the
port of process 0.
"""

import json
import os
import pathlib
import signal
import sys
import threading

import jax
import numpy as np
from PIL import Image

from configs import finetune
from vlm_jax.build import build
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.loop import Trainer

IMAGES = {"qwen2_5_vl": 64, "deepseek_vl_v2": 4}  # patches, or tiles, of a row's images
# Of encoder, connector and decoder. The patches' kernel of the second one is small: with 1e-4 for its encoder, a change
# of the release by its rounding grows within 20 steps to 0.03 of the loss, on one device too.
RATES = {"qwen2_5_vl": (1e-3, 1e-3, 1e-3), "deepseek_vl_v2": (1e-5, 1e-4, 3e-4)}
SIZES = [(20, 40), (33, 24), (16, 16)]  # (height, width) of the pictures
PICTURES = ((0,), (1, 2), (), (2,), (1,), (), (0, 2), (0,))  # of each conversation
WATCHDOG = 15.0  # seconds


def write(folder):
    """Writes pictures and conversations with one picture, several or none."""
    draw = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    records = []
    for number, pictures in enumerate(PICTURES):
        said = [("human", "<image>\n" * len(pictures) + f"what is {number}?"), ("gpt", "x" * (number + 1))]
        turns = [{"from": speaker, "value": value} for speaker, value in said]
        images = {"image": [f"{one}.png" for one in pictures]} if pictures else {}
        records.append({"id": str(number), "conversations": turns, **images})
    for name in ("train", "evaluation"):
        (folder / f"{name}.json").write_text(json.dumps(records))


def get_config(folder, system, steps, loop):
    """All parts of a release are trained, with the data of a folder."""
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder / system), "float32"
        config.data.train_path, config.data.evaluation_path = (
            str(folder / f"{name}.json") for name in ("train", "evaluation")
        )
        config.row.update({"length": 64, "images": IMAGES[system]})
        config.decoder.remat = "none"
        rates = dict(zip(("encoder", "connector", "decoder"), RATES[system], strict=True))
        config.stages.instruction.update({"steps": steps, "batch_size": 4, "warmup_steps": 2})
        config.stages.instruction.learning_rates = rates
        config.optimizer.epsilon = 1e-3  # as in tests/train/stepping.py
        config.loop.update({"save_every": steps, "log_every": 5, "writers": (), "watchdog": WATCHDOG, **loop})
    return config


def train(folder, workdir, system, mesh, steps, killed=None, **loop):
    """Trains to the last step.

    Args:
      folder: with releases by name, and the data.
      workdir: of the run.
      system: name of the release.
      mesh: such as `fsdp=2,expert=2`.
      steps: of the run.
      killed: None, or an index of a process and a step, in the middle of which it is killed.
      **loop: keys of `config.loop`.
    """
    least = float("inf")  # seconds of a step, since some run beside the write of a checkpoint

    def progress(step, steps, metrics):
        nonlocal least
        least = min(least, metrics["seconds"])
        if killed == [jax.process_index(), step + 1]:
            threading.Timer(least / 2, os.kill, (os.getpid(), signal.SIGKILL)).start()

    sizes = {name: int(size) for name, size in (word.split("=") for word in mesh.split(","))}
    config = get_config(pathlib.Path(folder), system, steps, loop)
    made = make_mesh(MeshSettings(**{"data": 1, **sizes}), jax.devices()[: int(np.prod(list(sizes.values())))])
    Trainer(config, build(config), made, workdir, progress=progress).run()


def main(job, count="1", index="0", port="0"):
    """Runs one process."""
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    for arguments in json.loads(job):
        train(**arguments)


if __name__ == "__main__":
    flags = os.environ["XLA_FLAGS"]
    import tests.conftest  # noqa: F401  # JAX's settings, but for the number of devices

    os.environ["XLA_FLAGS"] = flags
    main(*sys.argv[1:])
