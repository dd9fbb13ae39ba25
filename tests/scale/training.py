"""Training of a small release on pictures from files: `python -m tests.scale.training FOLDER WORKDIR MESH [WHERE]`.

MESH is such as `fsdp=2,expert=2`. WHERE is the number of processes, the index of this one and the port of process 0.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from configs import finetune
from vlm_jax.build import build
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.loop import Trainer

STEPS = 20
SYSTEMS = {"qwen2_5_vl": 256, "deepseek_vl_v2": 12}  # patches, or tiles, of a row's images
SIZES = [(20, 40), (33, 24), (16, 16)]  # (height, width) of the pictures
PICTURES = ((0,), (1, 2), (), (2,), (1,), (), (0, 2), (0,))  # of each conversation


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


def get_config(folder, system):
    """All parts of the release in the folder are trained."""
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder / "release"), "float32"
        config.data.train_path, config.data.evaluation_path = (
            str(folder / f"{name}.json") for name in ("train", "evaluation")
        )
        config.row.update({"length": 128, "images": SYSTEMS[system]})
        config.decoder.remat = "none"
        rates = dict.fromkeys(("encoder", "connector", "decoder"), 3e-3)
        config.stages.instruction.update({"steps": STEPS, "batch_size": 8, "warmup_steps": 2})
        config.stages.instruction.learning_rates = rates
        config.optimizer.epsilon = 1e-3  # as in tests/train/stepping.py
        config.loop.update({"save_every": 4, "log_every": 1, "writers": (), "watchdog": 15.0})
    return config


def main(folder, workdir, mesh, count="1", index="0", port="0"):
    """Runs one process to the end of the run."""
    folder = pathlib.Path(folder)
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    sizes = {name: int(size) for name, size in (word.split("=") for word in mesh.split(","))}
    system = (folder / "system").read_text()
    config = get_config(folder, system)
    Trainer(config, build(config), make_mesh(MeshSettings(**{"data": 1, **sizes})), workdir).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
