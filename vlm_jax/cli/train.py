"""python -m vlm_jax.cli.train --config=configs/X.py --workdir=DIR [--init_from=DIR]"""

from typing import Any

from absl import flags

from vlm_jax.build import build
from vlm_jax.cli import command
from vlm_jax.cli.progress import open_progress
from vlm_jax.config import parse
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.loop import Trainer

INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Initial parameters of the parts of the model: a folder that cli.convert wrote, or the checkpoints of another run.",
)


def main() -> None:
    """Trains every stage of a config, and evaluates on the way and at the end; see `train.loop.Trainer`."""
    config, workdir = command.CONFIG.value, command.workdir()
    experiment = build(config)
    mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"))
    evaluator = evaluator_of(experiment, config)
    with open_progress() as progress:
        start: Any = {"init_from": INIT_FROM.value, "init_parts": experiment.parts}
        told: Any = {"progress": progress, "evaluator": evaluator, "tell": progress.tell}
        Trainer(config, experiment, mesh, workdir, **start, **told).run()


if __name__ == "__main__":
    command.run(main)
