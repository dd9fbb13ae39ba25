"""Training steps of a Qwen2.5-VL compared with a loop of `transformers` and PyTorch; see README.md.

Every contender has a separate process, on the same cores, and they alternate, one step each per round, while the
others sleep.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import release

ROOT = Path(__file__).resolve().parents[2]
RATE, STEPS = 1e-4, 1000  # of the cosine
TEXT_PLACES = 64
OURS, THEIRS = "ours", "transformers"
CHOSEN = ("full", "dots")  # by `cli.train`
# name -> remat of the tower and of the decoder
CONTENDERS = {OURS: CHOSEN, "ours, remat none": ("none", "none"), "ours, remat full": ("full", "full"), THEIRS: CHOSEN}
# Of the pictures of mixed sizes, as shares of the largest.
SIDES = (1.0, 0.5, 0.75, 0.5, 0.25, 0.5, 0.5, 0.25, 0.25, 0.75, 0.25, 0.5, 0.5, 0.25, 0.5, 0.25)

Step = Callable[[], float]  # one step; returns its loss


def peak() -> int:
    """Most bytes that the process had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def config_of(folder: Path, remat: tuple[str, str], length: int, images: int) -> Any:
    """The release as `configs/finetune.py` trains it, in float32."""
    sys.path.append(str(ROOT))
    from configs import finetune

    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder), "float32"
        config.row.update({"length": length, "images": images})
        config.encoder.remat, config.decoder.remat = remat
        config.stages.instruction.learning_rates = {"encoder": RATE, "connector": RATE, "decoder": RATE}
    return config


def experiment_of(folder: Path, remat: tuple[str, str], length: int, images: int) -> Any:
    """Builds the experiment of `config_of`."""
    config = config_of(folder, remat, length, images)
    from vlm_jax.build import build

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

    @functools.cached_property
    def like(self) -> Any:
        import jax

        from vlm_jax.sharding.rules import placed
        from vlm_jax.train.state import init_boxed

        boxed = self.experiment.boxed_shapes()
        return placed(jax.eval_shape(lambda params: init_boxed(params, self.tx, self.paths), boxed), self.mesh)

    def steps(self, batches: list[Any]) -> tuple[list[Step], int]:
        """A step with each of some batches of one shape, and the bytes of its temporaries."""
        import jax

        from vlm_jax.sharding.rules import distribute
        from vlm_jax.train.step import compile_step

        batches = [distribute(batch, self.mesh) for batch in batches]
        settings = {"objective": self.objective, "tx": self.tx, "trained": self.paths}
        program = compile_step(self.like, batches[0], self.mesh, **settings)
        self.state = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), self.state, self.like)

        def run(batch: Any) -> float:
            self.state, metrics = program(self.state, batch, self.key)
            return float(metrics["loss"])

        used: Any = program.memory_analysis()
        return [functools.partial(run, batch) for batch in batches], used.temp_size_in_bytes


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
    experiment = experiment_of(Path(folder), CONTENDERS[name], *shape(Path(folder), side))
    batch, temporaries = batch_of(experiment, side), None
    if name == THEIRS:
        run = theirs(Path(folder), batch, experiment.system.processor.tokenizer.encode(release.TAGS[1])[0], len(cores))
    else:
        (run,), temporaries = Ours(experiment).steps([batch])
    while pipe.recv():
        start, used = time.perf_counter(), time.process_time()
        loss = run()
        pipe.send((loss, time.perf_counter() - start, time.process_time() - used))
    pipe.send((temporaries, peak()))


def shape(folder: Path, side: int) -> tuple[int, int]:
    """Positions and patches of a row with one picture."""
    patches = (side // json.loads((folder / "preprocessor_config.json").read_text())["patch_size"]) ** 2
    return patches // 4 + TEXT_PLACES, patches


def products(pipe: Connection, name: str, tiny: bool, cores: set[int]) -> None:
    """Seconds of the linear layers' products alone, those of the gradient too, by the library of a contender."""
    os.sched_setaffinity(0, cores)
    text, tower, side, vocabulary = release.sizes(tiny)
    patches = (side // tower["patch_size"]) ** 2
    width, rows, few = text["hidden_size"], 2 * (patches // 4 + TEXT_PLACES), tower["hidden_size"]
    narrow = width * text["num_key_value_heads"] // text["num_attention_heads"]
    depth, blocks = text["num_hidden_layers"], tower["depth"]
    layers = [  # (rows, input, output, how often)
        (rows, width, width, 2 * depth), (rows, width, narrow, 2 * depth), (rows, width, vocabulary, 1),
        (rows, width, text["intermediate_size"], 2 * depth), (rows, text["intermediate_size"], width, depth),
        (2 * patches, few, few, 4 * blocks), (2 * patches, few, tower["intermediate_size"], 2 * blocks),
        (2 * patches, tower["intermediate_size"], few, blocks),
    ]  # fmt: skip
    draw = np.random.default_rng(0).standard_normal
    arrays = [[draw(shape, np.float32) for shape in ((n, i), (i, o), (n, o))] for n, i, o, _ in layers]
    if name == THEIRS:
        import torch

        torch.set_num_threads(len(cores))
        given = [[torch.from_numpy(x), torch.from_numpy(w.T.copy()), torch.from_numpy(g)] for x, w, g in arrays]
        of_layer = [(lambda x, w, g: x @ w.T), (lambda x, w, g: g @ w), (lambda x, w, g: g.T @ x)]
    else:
        import jax

        given = [[jax.device_put(array) for array in group] for group in arrays]
        of_layer = [jax.jit(lambda x, w, g: x @ w), jax.jit(lambda x, w, g: g @ w.T), jax.jit(lambda x, w, g: x.T @ g)]
    while pipe.recv():
        start = time.perf_counter()
        for (*_, often), (x, w, g) in zip(layers, given, strict=True):
            for _ in range(often):
                made = [product(x, w, g) for product in of_layer]
                if name != THEIRS:
                    jax.block_until_ready(made)
        pipe.send(time.perf_counter() - start)


def packing(pipe: Connection, folder: str, side: int, cores: set[int]) -> None:
    """Seconds of steps over the same pictures of mixed sizes, a row each, and packed into rows of the same shape."""
    os.sched_setaffinity(0, cores)
    from vlm_jax.data.loader import join

    length, images = shape(Path(folder), side)
    ours = Ours(experiment_of(Path(folder), CHOSEN, length, images))
    samples = [release.sample(i, round(side * share), 28 + 8 * (i % 4)) for i, share in enumerate(SIDES)]
    rows: list[list[Any]] = []
    for one in samples:  # first fit
        for row in rows:
            if holds([*row, one], ours.experiment):
                row.append(one)
                break
        else:
            rows.append([one])
    batches = {}
    for name, grouped in (("padded", [[one] for one in samples]), ("packed", rows)):
        made = [ours.experiment.training_row(*row) for row in grouped]
        made += made[: len(made) % 2]  # the last of an odd number counts as two
        batches[name] = [join(pair) for pair in zip(made[::2], made[1::2], strict=True)]
    steps, _ = ours.steps([batch for of in batches.values() for batch in of])
    run = {"padded": steps[: len(batches["padded"])], "packed": steps[len(batches["padded"]) :]}
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


def measure(
    folder: str, side: int, rounds: int, cores: set[int], tiny: bool
) -> tuple[dict[str, list[list[float]]], dict[str, tuple[int | None, int]], list[tuple[Any, Any]], dict[str, float]]:
    """(loss, seconds, processor seconds) of every step, (temporaries, peak), what `packing` sends, and `products`."""
    context = multiprocessing.get_context("spawn")
    pipes, steps = {}, {name: [] for name in CONTENDERS}
    for name in CONTENDERS:
        pipes[name], given = context.Pipe()
        context.Process(target=serve, args=(given, name, folder, side, cores), daemon=True).start()
        pipes[name].send(True)  # a first step, which compiles or warms up, before the next one starts
        steps[name].append(pipes[name].recv())
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            steps[name].append(pipe.recv())
    memory = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        memory[name] = pipe.recv()
    alone, seconds = {}, {name: [] for name in (OURS, THEIRS)}
    for name in seconds:
        alone[name], given = context.Pipe()
        context.Process(target=products, args=(given, name, tiny, cores), daemon=True).start()
    for _ in range(rounds + 1):
        for name, pipe in alone.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in alone.values():
        pipe.send(False)
    pipe, given = context.Pipe()
    context.Process(target=packing, args=(given, folder, side, cores), daemon=True).start()
    packed = []
    for _ in range(rounds + 1):
        pipe.send(True)
        packed.append(pipe.recv())
    pipe.send(False)
    return steps, memory, packed[1:], {name: statistics.median(of[1:]) for name, of in seconds.items()}


def table(steps: Any, memory: Any, packed: Any, alone: dict[str, float], growth: list[int], logits: int) -> str:
    """The results in Markdown; the first step of each is not among the medians."""
    medians = {name: [statistics.median(step[i] for step in of[1:]) for i in (1, 2)] for name, of in steps.items()}
    lines = ["| | step, s | of theirs | processor time, s | temporaries, MB | peak of the process, MB | losses |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, (seconds, used) in medians.items():
        temporaries, peak_bytes = memory[name]
        cells = [f"{seconds:.2f}", f"{seconds / medians[THEIRS][0]:.2f}", f"{used:.2f}"]
        cells += ["" if temporaries is None else f"{temporaries / 1e6:.0f}", f"{peak_bytes / 1e6:.0f}"]
        cells.append(", ".join(f"{step[0]:.4f}" for step in steps[name][:3]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = {kind: statistics.median(one[0][kind] for one in packed) for kind in ("padded", "packed")}
    counts = packed[0][1]
    lines += [
        "",
        f"The linear layers' products alone, forward and backward: {alone[OURS]:.2f} s by XLA, {alone[THEIRS]:.2f} s "
        f"by PyTorch, {alone[OURS] / alone[THEIRS]:.2f} of it.",
        "",
        f"{len(SIDES)} pictures of mixed sizes: {counts['padded']} steps, {seconds['padded']:.2f} s with a row each, "
        f"{counts['packed']} and {seconds['packed']:.2f} s packed: {seconds['packed'] / seconds['padded']:.2f} of it.",
        "",
        f"With twice the vocabulary, temporaries grow by {growth[0] / 1e6:.0f} MB. {growth[1] / 1e6:.0f} MB are the "
        f"gradient of the table; the additional logits would be {logits / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def temporaries_of(pipe: Connection, folder: str, side: int) -> None:
    """Bytes of the temporaries of a step, and those of the gradient of the embedding table."""
    experiment = experiment_of(Path(folder), CHOSEN, *shape(Path(folder), side))
    decoder = experiment.system.model.decoder
    _, temporaries = Ours(experiment).steps([batch_of(experiment, side)])
    pipe.send((temporaries, 4 * decoder.vocab_size * decoder.width))


def in_process(target: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends from a process of its own; None if it sends nothing."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def write(pipe: Connection, folder: str, tiny: bool, times: int) -> None:
    """The release, with so many times its vocabulary."""
    text, tower, side, vocabulary = release.sizes(tiny)
    release.write(Path(folder), text, tower, times * vocabulary, side)
    pipe.send(side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", default="0,1", help="cores for every contender")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the program")
    parser.add_argument("--out", type=Path, help="every step's loss and seconds, as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cores = {int(core) for core in arguments.cores.split(",")}
    with tempfile.TemporaryDirectory() as root:
        folders = [f"{root}/{times}" for times in (1, 2)]
        for times, folder in enumerate(folders, start=1):
            Path(folder).mkdir()
            side = in_process(write, folder, arguments.tiny, times)
        one, two = (in_process(temporaries_of, folder, side) for folder in folders)
        growth = [after - before for before, after in zip(one, two, strict=True)]
        logits = 2 * shape(Path(folders[0]), side)[0] * 4 * release.sizes(arguments.tiny)[3]
        measured = measure(folders[0], side, arguments.rounds, cores, arguments.tiny)
    print(table(*measured, growth, logits))
    if arguments.out is not None:
        names = ("steps", "memory", "packed", "products")
        arguments.out.write_text(json.dumps({**dict(zip(names, measured, strict=True)), "growth": growth}))


if __name__ == "__main__":
    main()
