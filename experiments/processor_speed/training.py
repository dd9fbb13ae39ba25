"""How long the steps of a training run wait for their images, by the number of input workers.

    python experiments/processor_speed/training.py

Images are JPEG files of 768 x 1024 pixels next to a JSONL file of questions, written to a temporary folder. First
only the input runs, then a ViT-S/16 with a small decoder is trained by the package's training loop,
whose `metrics.jsonl` has the waiting time of each step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import base, digits_stages
from vlm_jax.build import build
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.input import stage_batches
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

HEIGHT, WIDTH = 768, 1024


def write_pictures(folder: Path, count: int) -> None:
    """Smooth noise like photographs, about 200 KB each, with one question."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(count):
        small = draw.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        picture = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.jpg", quality=90)
        lines.append(json.dumps({"id": i, "image": f"{i}.jpg", "question": "count 3", "answer": str(i % 10)}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "test.jsonl").write_text(lines[0] + "\n")


def config_of(folder: Path, batch_size: int, steps: int, workers: int) -> ConfigDict:
    """A ViT-S/16 at 224 pixels, 49 visual tokens, and a decoder of four layers; all parts are trained."""
    config = base.get_config()
    config.token_budget = 49
    config.data = ConfigDict(
        {
            "kind": "conversations",
            "train_path": str(folder / "train.jsonl"),
            "evaluation_path": str(folder / "test.jsonl"),
        }
    )
    statistics_ = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    config.processor.update({"image_size": (224, 224), "filter": "bicubic", "independent_turns": False, **statistics_})
    config.encoder.update({"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536})
    config.encoder.remat = "none"
    config.decoder.update({"width": 384, "depth": 4, "num_heads": 6, "num_kv_heads": 6, "mlp_dim": 1024})
    config.connector = ConfigDict({"kind": "pool"})
    stage = digits_stages.instruction()
    stage.update({"steps": steps, "batch_size": batch_size, "warmup_steps": 1})
    stage.learning_rates = ConfigDict({"encoder": 1e-4, "connector": 1e-4, "decoder": 1e-4})
    config.stages, config.schedule = ConfigDict({"instruction": stage}), ("instruction",)
    # Every step is awaited before the next batch is requested, so that no wait overlaps with a step.
    config.loop.update({"save_every": 10**6, "log_every": 1, "input_workers": workers})
    return config.lock()


def input_alone(config: ConfigDict, batches: int) -> float:
    """Images per second, after the first batch."""
    experiment = build(config)
    (span,) = parse_schedule(tuple(config.schedule), config.stages)
    workers, mesh = config.loop.input_workers, make_mesh(MeshSettings())
    iterator = stage_batches(experiment, span.stage, config.seed, mesh, num_workers=workers)
    for _ in range(2 * max(1, config.loop.input_workers) + 1):  # batches that were prefetched while workers started
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - start
    iterator.close()
    return batches * span.stage.batch_size / seconds


def trained(config: ConfigDict, folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    workdir = folder / f"run{config.loop.input_workers}"
    Trainer(config, build(config), make_mesh(MeshSettings()), workdir).run()
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2))
    arguments = parser.parse_args()
    print("| input workers | images/s, only input | s per step | first wait, s | median wait, ms | longest wait, ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, arguments.pictures)
        for workers in arguments.workers:
            config = config_of(folder, arguments.batch_size, arguments.steps, workers)
            rate = input_alone(config, 32)
            first, *rest = trained(config, folder)
            waits = [1e3 * line["input_seconds"] for line in rest]
            step = statistics.median(line["seconds"] for line in rest)
            print(
                f"| {workers} | {rate:.0f} | {step:.2f} | {first['input_seconds']:.2f} | "
                f"{statistics.median(waits):.1f} | {max(waits):.1f} |"
            )


if __name__ == "__main__":
    main()
