"""Time and memory of SigLIP's image tower compared with `transformers`; see README.md for the question and commands.

Every contender has a separate process, on the same two cores. The processes alternate, one
measured step each per round, while the others sleep.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

# google/siglip-base-patch16-224, vision_config; missing keys have the class's defaults.
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "image_size": 224, "patch_size": 16}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 16}  # fmt: skip

# name -> (package, its settings)
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, scanned": ("jax", {"unroll": False, "remat": "none"}),
    "ours, unrolled": ("jax", {"unroll": True, "remat": "none"}),
    "ours, scanned, remat dots": ("jax", {"unroll": False, "remat": "dots"}),
    "ours, scanned, remat full": ("jax", {"unroll": False, "remat": "full"}),
    "transformers, SDPA": ("torch", {"compiled": False}),
    "transformers, SDPA, torch.compile": ("torch", {"compiled": True}),
}
THEIRS = [name for name, (package, _) in CONTENDERS.items() if package == "torch"]
# Only the four products of every block: the bound of each package's linear algebra.
PRODUCTS = {"matrix products, XLA": "jax", "matrix products, PyTorch": "torch"}
STEPS = ("forward", "forward and backward")

Step = Callable[[], Any]


def memory(field: str) -> int:
    """A field of the process's status in bytes: VmRSS is current, VmHWM the maximum since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def pixels_of(settings: dict[str, int], batch: int) -> np.ndarray:
    """Images in the format of `transformers`, [B, 3, side, side] float32."""
    side = settings["image_size"]
    return np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)


def jax_steps(folder: str, batch: int, *, unroll: bool, remat: str) -> tuple[int, dict[str, Step]]:
    """Our tower, loaded from the released folder."""
    import jax
    import jax.numpy as jnp

    import vlm_jax

    base = memory("VmRSS")
    ours = vlm_jax.from_pretrained(folder)
    module = ours.module.clone(remat=remat, unroll=ours.module.depth if unroll else 1)
    images = jnp.asarray(pixels_of(ours.config, batch).transpose(0, 2, 3, 1))

    @jax.jit
    def forward(params, images):
        return module.apply({"params": params}, images).pooled

    @jax.jit
    def both(params, images):
        return jax.value_and_grad(lambda params: jnp.sum(jnp.square(forward(params, images))))(params)

    def run(function):
        return jax.block_until_ready(function(ours.params, images))

    return base, {STEPS[0]: functools.partial(run, forward), STEPS[1]: functools.partial(run, both)}


def torch_steps(folder: str, batch: int, *, compiled: bool, threads: int) -> tuple[int, dict[str, Step]]:
    """The tower of `transformers`, with PyTorch's own attention."""
    import torch
    from transformers import SiglipVisionModel

    torch.set_num_threads(threads)
    base = memory("VmRSS")
    tower = SiglipVisionModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    images = torch.from_numpy(pixels_of(tower.config.to_dict(), batch))
    model = torch.compile(tower) if compiled else tower

    def forward():
        with torch.no_grad():
            return model(pixel_values=images).pooler_output.numpy()

    def both():
        tower.zero_grad(set_to_none=True)
        loss = model(pixel_values=images).pooler_output.square().sum()
        loss.backward()
        return loss.item()

    return base, {STEPS[0]: forward, STEPS[1]: both}


def product_steps(package: str, settings: dict[str, int], batch: int, threads: int) -> tuple[int, dict[str, Step]]:
    """The products of all blocks, once for forward, and three times for forward with backward."""
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    rows = batch * (settings["image_size"] // settings["patch_size"]) ** 2
    rng = np.random.default_rng(0)
    shapes = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    pairs = [(rng.normal(size=(rows, m)), rng.normal(size=(m, n))) for m, n in shapes]
    base = memory("VmRSS")
    if package == "jax":
        import jax
        import jax.numpy as jnp

        ours = [tuple(jnp.asarray(side, jnp.float32) for side in pair) for pair in pairs]
        product = jax.jit(jnp.dot)

        def block() -> Any:
            return jax.block_until_ready([product(*pair) for pair in ours])
    else:
        import torch

        torch.set_num_threads(threads)
        theirs = [tuple(torch.from_numpy(side).float() for side in pair) for pair in pairs]

        def block() -> Any:
            return [left @ right for left, right in theirs]

    def run(times: int) -> None:
        for _ in range(times * settings["num_hidden_layers"]):
            block()

    return base, {STEPS[0]: functools.partial(run, 1), STEPS[1]: functools.partial(run, 3)}


def product_flops(settings: dict[str, int], batch: int) -> int:
    """Floating-point operations of `product_steps`' forward step."""
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    rows = batch * (settings["image_size"] // settings["patch_size"]) ** 2
    return 2 * rows * (4 * width**2 + 2 * width * hidden) * settings["num_hidden_layers"]


def work(pipe: Connection, name: str, folder: str, settings: dict[str, int], batch: int, cores: set[int]) -> None:
    """A contender's process: builds and warms up a step on the first request, then runs it once per request."""
    os.sched_setaffinity(0, cores)
    if name in PRODUCTS:
        base, steps = product_steps(PRODUCTS[name], settings, batch, len(cores))
    else:
        package, options = CONTENDERS[name]
        if package == "jax":
            base, steps = jax_steps(folder, batch, **options)
        else:
            base, steps = torch_steps(folder, batch, threads=len(cores), **options)
    while True:
        order, label = pipe.recv()
        if order == "end":
            return
        if order == "warm":
            steps[label]()
            value = steps[label]()
            forget_peak()
            pipe.send(np.asarray(value) if label == STEPS[0] and name not in PRODUCTS else None)
        elif order == "run":
            start = time.perf_counter()
            value = steps[label]()
            pipe.send(time.perf_counter() - start)
            del value
        elif order == "memory":
            pipe.send((memory("VmHWM"), memory("VmHWM") - base))


def released_folder(folder: str, settings: dict[str, int]) -> None:
    """A checkpoint with random weights, written by `transformers`."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**settings)).save_pretrained(folder)


def measure(settings: dict[str, int], batch: int, rounds: int, cores: set[int]) -> dict[str, Any]:
    """Seconds of every round and peak bytes, {name: {step: {..}}}."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        maker = context.Process(target=released_folder, args=(folder, settings))
        maker.start()
        maker.join()
        pipes = {}
        for name in [*CONTENDERS, *PRODUCTS]:
            pipes[name], theirs = context.Pipe()
            context.Process(target=work, args=(theirs, name, folder, settings, batch, cores), daemon=True).start()

        def ask(name: str, order: str, label: str) -> Any:
            pipes[name].send((order, label))
            return pipes[name].recv()

        results: dict[str, Any] = {name: {} for name in pipes}
        for label in STEPS:
            outputs = {name: ask(name, "warm", label) for name in pipes}
            reference = outputs[THEIRS[0]]
            for name in CONTENDERS if label == STEPS[0] else ():
                results[name]["error"] = float(np.abs(outputs[name] - reference).max() / np.abs(reference).max())
            seconds: dict[str, list[float]] = {name: [] for name in pipes}
            for _ in range(rounds):
                for name in pipes:
                    seconds[name].append(ask(name, "run", label))
            for name in pipes:
                peak, rise = ask(name, "memory", label)
                results[name][label] = {"seconds": seconds[name], "peak": peak, "rise": rise}
        for pipe in pipes.values():
            pipe.send(("end", ""))
    return results


def table(results: dict[str, Any], settings: dict[str, int], batch: int) -> str:
    """The results in Markdown: medians, and each relative to the faster of theirs."""
    median = {n: {s: statistics.median(results[n][s]["seconds"]) for s in STEPS} for n in results}
    best = {s: min(median[name][s] for name in THEIRS) for s in STEPS}
    leanest = min(results[name][STEPS[1]]["rise"] for name in THEIRS)
    lines = ["| | forward, s | of theirs | forward and backward, s | of theirs | peak memory, MB | of theirs | error |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in CONTENDERS:
        cells = [f"{median[name][s]:.3f} | {median[name][s] / best[s]:.2f}" for s in STEPS]
        rise = results[name][STEPS[1]]["rise"]
        cells.append(f"{rise / 1e6:.0f} | {rise / leanest:.2f} | {results[name]['error']:.0e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for name in PRODUCTS:
        flops = [product_flops(settings, batch) * times for times in (1, 3)]
        rates = [count / median[name][s] / 1e9 for count, s in zip(flops, STEPS, strict=True)]
        cells = [f"{median[name][s]:.3f} s ({rate:.0f} GFLOP/s)" for s, rate in zip(STEPS, rates, strict=True)]
        lines.append(f"{name}: {' and '.join(cells)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", default="0,1", help="cores for every contender")
    parser.add_argument("--tiny", action="store_true", help="a small tower, to try the program")
    parser.add_argument("--out", type=Path, help="every round's seconds and all peaks, as JSON")
    arguments = parser.parse_args()
    settings = TINY if arguments.tiny else SIGLIP_BASE
    cores = {int(core) for core in arguments.cores.split(",")}
    results = measure(settings, arguments.batch, arguments.rounds, cores)
    print(table(results, settings, arguments.batch))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
