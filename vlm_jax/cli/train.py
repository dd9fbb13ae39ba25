"""python -m vlm_jax.cli.train --config=configs/X.py --workdir=DIR [--init_from=DIR]"""

import json
from typing import Any

import rich.console
import rich.progress
from absl import flags

from vlm_jax.build import build
from vlm_jax.cli import command
from vlm_jax.config import parse
from vlm_jax.evals.evaluation import evaluation_of
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.processes import is_primary
from vlm_jax.train.loop import Trainer
from vlm_jax.train.workdir import write_whole

INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Initial parameters of the parts of the model: a folder that cli.convert wrote, or the checkpoints of another run.",
)


def main() -> None:
    """Trains every stage of a config, then evaluates; writes `metrics.jsonl` and `evaluation.json`."""
    config, workdir = command.CONFIG.value, command.workdir()
    experiment = build(config)
    evaluation = evaluation_of(experiment, config.evaluation)
    mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"))
    console = rich.console.Console()
    with rich.progress.Progress(console=console) as bar:
        task = bar.add_task("training")

        def progress(step, steps, metrics):
            bar.update(task, total=steps, completed=step, description=f"{metrics['stage']} {metrics['loss']:.3f}")

        start: Any = {"init_from": INIT_FROM.value, "init_parts": experiment.parts}
        outcome = Trainer(config, experiment, mesh, workdir, progress=progress, **start).run()
    samples = experiment.open_source().evaluation(config.seed, evaluation.stream)
    report = evaluation.run(outcome.params, samples)
    if is_primary():
        result = {"accuracy": report.accuracy, "token_budget": config.token_budget, **report.further}
        write_whole(workdir / "evaluation.json", json.dumps(result, indent=2) + "\n")
    if tokens := report.further.get("num_visual_tokens"):
        console.print(f"visual tokens per image: {tokens['mean']} on average, {tokens['max']} at most")
    for name, entry in report.accuracy.items():
        console.print(f"{name}: {entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f}, n={entry['n']})")


if __name__ == "__main__":
    command.run(main)
