"""Training steps of a Qwen2.5-VL compared with a loop of `transformers` and PyTorch; see README.md.

Every contender has a separate process, on the same cores, and they alternate, one step each per round, while the
others sleep.
"""

import json
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import release

RATE, STEPS = 1e-4, 1000  # of the cosine
TEXT_PLACES = 64
OURS, THEIRS = "ours", "transformers"
# name -> remat of tower and decoder
CONTENDERS = {OURS: "none", "ours, remat dots": "dots", "ours, remat full": "full", THEIRS: ""}
SIDES = (1.0, 0.5, 0.75, 0.5, 0.25, 0.5, 0.75, 0.25)  # of the pictures of mixed sizes

Step = Callable[[], float]  # one step; returns its loss


def peak() -> int:
    """Most bytes that the process had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def experiment_of(folder: Path, remat: str, length: int, images: int) -> Any:
    """The release as `configs/finetune.py` trains it, in float32."""
    from configs import finetune
    from vlm_jax.build import build

    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder), "float32"
        config.row.update({"length": length, "images": images})
        config.encoder.remat = config.decoder.remat = remat
        config.stages.instruction.learning_rates = {"encoder": RATE, "connector": RATE, "decoder": RATE}
    return build(config)


class Ours:
    """Compiled steps of a release, and the state that they change."""

    def __init__(self, experiment: Any):
        import jax
        import jax.numpy as jnp

        from vlm_jax.leaves import flatten
        from vlm_jax.optim.adamw import OptimizerSettings, adamw
        from vlm_jax.sharding.mesh import MeshSettings, make_mesh
        from vlm_jax.train.objectives.next_token import NextToken
        from vlm_jax.train.state import TrainState

        self.experiment, self.mesh = experiment, make_mesh(MeshSettings(data=1), jax.devices()[:1])
        self.objective = NextToken().build(experiment)
        self.paths = frozenset(path for path, _ in flatten(experiment.boxed_shapes()))
        self.tx = adamw(OptimizerSettings(weight_decay=0.0), dict.fromkeys(self.paths, RATE), 0, STEPS)
        self.key, params = jax.random.key(0), experiment.initial(jax.random.key(0), self.mesh)
        self.state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(self.tx.init)(params))

    def compiled(self, batch: Any) -> Any:
        import jax

        from vlm_jax.train.state import abstract, init_boxed
        from vlm_jax.train.step import compile_step

        boxed = self.experiment.boxed_shapes()
        like = abstract(jax.eval_shape(lambda params: init_boxed(params, self.tx, self.paths), boxed), self.mesh)
        self.state = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), self.state, like)
        return compile_step(like, batch, self.mesh, objective=self.objective, tx=self.tx, trained=self.paths)

    def step(self, batch: Any) -> tuple[Step, int]:
        """A step with a batch, and the bytes of its temporaries."""
        from vlm_jax.sharding.rules import distribute

        batch = distribute(batch, self.mesh)
        program = self.compiled(batch)

        def run() -> float:
            self.state, metrics = program(self.state, batch, self.key)
            return float(metrics["loss"])

        return run, program.memory_analysis().temp_size_in_bytes


def batch_of(experiment: Any, side: int, rows: int = 2) -> Any:
    """Rows of one picture each that have no padding."""
    from vlm_jax.data.loader import join

    return join([experiment.training_row(release.sample(row, side, TEXT_PLACES)) for row in range(rows)])


def theirs(folder: Path, batch: Any, tags: int, threads: int) -> Step:
    """The usual loop: loss, backward, clipping, AdamW."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(threads)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").train()
    images = batch.images
    patches = np.take_along_axis(images.patches, images.order[..., None], 1).reshape(-1, images.patches.shape[-1])
    side = round(images.patches.shape[1] ** 0.5)
    labels = np.full(batch.tokens.shape, -100)
    labels[:, 1:] = np.where(batch.loss_weights[:, :-1] > 0, batch.targets[:, :-1], -100)
    given = {
        "input_ids": torch.from_numpy(batch.tokens).long(),
        "attention_mask": torch.ones(batch.tokens.shape, dtype=torch.long),
        "mm_token_type_ids": torch.from_numpy((batch.tokens == tags).astype(np.int64)),
        "labels": torch.from_numpy(labels),
        "pixel_values": torch.from_numpy(patches),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(batch.tokens)),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(**given, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        return loss.item()

    return run


def serve(pipe: Connection, name: str, folder: str, side: int, cores: set[int]) -> None:
    """A contender's process: one step per request; what it sends is (loss, seconds, processor seconds)."""
    os.sched_setaffinity(0, cores)
    experiment = experiment_of(Path(folder), CONTENDERS[name] or "none", *shape(Path(folder), side))
    batch, temporaries = batch_of(experiment, side), None
    if name == THEIRS:
        run = theirs(Path(folder), batch, experiment.system.processor.tokenizer.encode(release.TAGS[1])[0], len(cores))
    else:
        run, temporaries = Ours(experiment).step(batch)
    while pipe.recv():
        start, used = time.perf_counter(), time.process_time()
        loss = run()
        pipe.send((loss, time.perf_counter() - start, time.process_time() - used))
    pipe.send((temporaries, peak()))


def shape(folder: Path, side: int) -> tuple[int, int]:
    """Positions and patches of a row with one picture."""
    patches = (side // json.loads((folder / "preprocessor_config.json").read_text())["patch_size"]) ** 2
    return patches // 4 + TEXT_PLACES, patches


def packing(pipe: Connection, folder: str, side: int, cores: set[int]) -> None:
    """Seconds of steps over the same pictures of mixed sizes, a row each, and packed into rows of the same shape."""
    os.sched_setaffinity(0, cores)
    from vlm_jax.data.loader import join
    from vlm_jax.processors.processor import Processor  # noqa: F401

    length, images = shape(Path(folder), side)
    ours = Ours(experiment_of(Path(folder), "none", length, images))
    samples = [release.sample(i, round(side * share), 28 + 8 * (i % 4)) for i, share in enumerate(SIDES)]
    rows: list[list[Any]] = []
    for one in samples:  # first fit
        for row in rows:
            if holds([*row, one], ours.experiment):
                row.append(one)
                break
        else:
            rows.append([one])
    run = {}
    for name, grouped in (("padded", [[one] for one in samples]), ("packed", rows)):
        made = [ours.experiment.training_row(*row) for row in grouped]
        made += made[: len(made) % 2]  # the last of an odd number counts as two
        run[name] = [ours.step(join(pair))[0] for pair in zip(made[::2], made[1::2], strict=True)]
    while pipe.recv():
        seconds = {}
        for name, steps in run.items():
            start = time.perf_counter()
            for step in steps:
                step()
            seconds[name] = time.perf_counter() - start
        pipe.send((seconds, {name: len(steps) for name, steps in run.items()}))


def holds(samples: list[Any], experiment: Any) -> bool:
    """Whether samples fit in a row."""
    from vlm_jax.types import SampleSizes

    loads = [
        experiment.measure(SampleSizes(one.sample_id, one.messages, tuple(i.shape[:2] for i in one.images)))
        for one in samples
    ]
    return experiment.row.holds(sum(loads[1:], loads[0]))
