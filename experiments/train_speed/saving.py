"""What logging, saving and evaluating take of a run of 100 M parameters, by the training loop itself; see README.md.

The run saves every `--cycle` steps and writes its log every `WINDOW`. The first windows after a save run beside its
writing in the background, the last one alone. A save takes what the loop waits for it, and what the steps beside it
take longer than those alone. Windows of both kinds alternate, and each number is the median over all cycles but the
first.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import release
from benchmark import CHOSEN, ROOT, TEXT_PLACES, config_of, in_process, shape, write

WINDOW, CYCLE, TINY_CYCLE = 2, 10, 100  # steps; those of the small model take less of the time of a save
ANSWERS, TOKENS = 8, 48  # questions of an evaluation, and the most tokens of an answer


def write_data(folder: Path, side: int, count: int) -> Path:
    """Conversations about random pictures, in LLaVA's format, whose rows have no padding."""
    from PIL import Image

    folder.mkdir()
    records = []
    for number in range(count):
        sample = release.sample(number, side, TEXT_PLACES)
        Image.fromarray(sample.images[0]).save(folder / f"{number}.png")
        said = [{"from": "human", "value": f"<image>{sample.question}"}, {"from": "gpt", "value": sample.answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def config_of_run(folder: Path, side: int, cycles: int, cycle: int) -> Any:
    """Of the release in a folder, on its own data."""
    config = config_of(folder, CHOSEN, *shape(folder, side))
    with config.unlocked():
        config.data.train_path, config.data.evaluation_path = (
            str(write_data(folder / name, side, ANSWERS)) for name in ("train", "evaluation")
        )
        config.stages.instruction.update({"steps": (cycles + 1) * cycle, "batch_size": 2, "warmup_steps": 1})
        config.loop.update({"save_every": cycle, "log_every": WINDOW, "keep": 1})
        config.evaluation.update({"batch_size": ANSWERS, "max_new_tokens": TOKENS})
    return config


def run(pipe: Connection, folder: str, side: int, cycles: int, cycle: int, cores: set[int]) -> None:
    """Trains; what it sends are seconds of each log, save, evaluation and batch, and of a step in each window."""
    os.sched_setaffinity(0, cores)
    sys.path.append(str(ROOT))
    import jax

    from vlm_jax.build import build
    from vlm_jax.evals.evaluators import evaluator_of
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh
    from vlm_jax.train.loop import Trainer, is_done

    config = config_of_run(Path(folder), side, cycles, cycle)
    experiment, mesh = build(config), make_mesh(MeshSettings(data=1), jax.devices()[:1])
    evaluator = evaluator_of(experiment, config)
    seconds: dict[str, list[float]] = {"log": [], "save": [], "evaluation": [], "batch": [], "window": []}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        found = call(*arguments)
        seconds[name].append(time.perf_counter() - start)
        return found

    class Timed(Trainer):
        def _flush(self, *arguments: Any) -> None:
            timed("log", super()._flush, *arguments)

        def _next(self, iterator: Any, metrics: Any) -> Any:
            if metrics is None or not is_done(metrics):  # beside the step
                return super()._next(iterator, metrics)
            return timed("batch", super()._next, iterator, metrics)

        def _checkpoints(self) -> Any:
            made = super()._checkpoints()
            save = made.save

            def evaluate_and_save(step: int, state: Any, position: Any) -> None:
                timed("evaluation", lambda: evaluator.metrics(evaluator.rows(self._usable(state))))
                timed("save", save, step, state, position)

            made.save = evaluate_and_save
            self.made = made
            return made

    def progress(step: int, steps: int, line: Any) -> None:
        seconds["window"].append(line["seconds"])
        if step % cycle == cycle - WINDOW and trainer.made._manager.is_saving_in_progress():
            raise RuntimeError(f"a save takes longer than {cycle - WINDOW} steps; raise --cycle")

    trainer = Timed(config, experiment, mesh, Path(folder) / "run", progress=progress)
    trainer.run()
    pipe.send(seconds)


def costs(seconds: dict[str, list[float]], cycle: int) -> dict[str, float]:
    """Seconds of a step alone, a write of the log, both halves of a save, and an evaluation."""
    places = cycle // WINDOW
    windows = seconds["window"][places:]
    of_place = [statistics.median(windows[place::places]) for place in range(places)]
    alone = of_place[-1]
    return {
        "step": alone,
        "log": statistics.median(seconds["log"]) + statistics.median(seconds["batch"]),
        "waits": statistics.median(seconds["save"][1:]),
        "beside": WINDOW * sum(one - alone for one in of_place[:-1]),
        "evaluation": statistics.median(seconds["evaluation"][1:]),
    }


def table(found: dict[str, float], log_every: int, save_every: int) -> str:
    """The results in Markdown."""
    step = found["step"]
    rows = [
        ("a write of the log", found["log"], log_every),
        ("a save: the loop waits", found["waits"], save_every),
        ("a save: steps beside the writing", found["beside"], save_every),
    ]
    lines = ["| | s | every | of a step |", "|---|---|---|---|", f"| a step alone | {step:.3f} | | |"]
    lines += [f"| {name} | {took:.3f} | {every} steps | {took / every / step:.2%} |" for name, took, every in rows]
    together = sum(took / every for _, took, every in rows) / step
    lines.append(f"| **logging and saving together** | | | **{together:.2%}** |")
    took = found["evaluation"]
    name = f"an evaluation: {ANSWERS} answers of up to {TOKENS} tokens"
    return "\n".join([*lines, f"| {name} | {took:.3f} | {save_every} steps | {took / save_every / step:.2%} |"])


def main() -> None:
    sys.path.append(str(ROOT))
    from vlm_jax.train.settings import LoopSettings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="saves that are measured")
    parser.add_argument("--cycle", type=int, help=f"steps between saves, a multiple of {WINDOW}")
    parser.add_argument("--cores", default="0,1", help="cores of the run")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the program")
    parser.add_argument("--out", type=Path, help="all seconds, as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cycle = arguments.cycle or (TINY_CYCLE if arguments.tiny else CYCLE)
    cores = {int(core) for core in arguments.cores.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        side = in_process(write, folder, arguments.tiny, 1)
        seconds = in_process(run, folder, side, arguments.rounds, cycle, cores)
    if seconds is None:
        sys.exit("the run failed")
    print(table(costs(seconds, cycle), LoopSettings.log_every, LoopSettings.save_every))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
