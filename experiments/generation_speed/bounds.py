"""What a prompt and a step of the benchmark's model take at least on a CPU: its products alone, and reading it."""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

DEPTH, WIDTH, MLP, VOCABULARY = 12, 768, 2048, 32_000
# Query, key and value as one kernel, gate and up as one, as generation lays them out; then those of PyTorch's Llama.
BLOCKS = {
    "XLA": [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * MLP), (MLP, WIDTH)] * DEPTH,
    "PyTorch": ([(WIDTH, WIDTH)] * 4 + [(WIDTH, MLP)] * 2 + [(MLP, WIDTH)]) * DEPTH,
}
HEAD = [(WIDTH, VOCABULARY)]
PARAMETERS = 110e6
CASES = [("blocks", rows) for rows in (1, 8, 64, 256, 512, 1024, 2048)] + [("head", rows) for rows in (1, 8)]


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def products(threads: int) -> dict[str, Callable[[str, int], Callable[[], Any]]]:
    """The products of all blocks, or of the head, for so many rows, each kernel an array of its own."""
    import jax
    import jax.numpy as jnp
    import torch

    torch.set_num_threads(threads)

    def kernels(name: str, part: str) -> list[np.ndarray]:
        draw = np.random.default_rng(0)
        return [draw.standard_normal(shape, dtype=np.float32) for shape in (HEAD if part == "head" else BLOCKS[name])]

    def xla(part: str, rows: int) -> Callable[[], Any]:
        ours = [jnp.asarray(kernel) for kernel in kernels("XLA", part)]
        given = {width: jnp.full((rows, width), 0.01) for width in (WIDTH, MLP)}
        run = jax.jit(lambda given, kernels: [given[kernel.shape[0]] @ kernel for kernel in kernels])
        compiled = run.lower(given, ours).compile()
        return lambda: jax.block_until_ready(compiled(given, ours))

    def mkl(part: str, rows: int) -> Callable[[], Any]:
        theirs = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels("PyTorch", part)]
        given = {width: torch.full((rows, width), 0.01) for width in (WIDTH, MLP)}

        @torch.inference_mode()
        def run() -> None:
            for kernel in theirs:
                torch.nn.functional.linear(given[kernel.shape[1]], kernel)

        return run

    return {"XLA": xla, "PyTorch": mkl}


def bandwidth(threads: int) -> float:
    """Bytes a second of reading, an array a thread."""
    arrays = [np.ones(60_000_000, np.float32) for _ in range(threads)]

    def read() -> None:
        running = [threading.Thread(target=np.max, args=(array,)) for array in arrays]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    return sum(array.nbytes for array in arrays) / statistics.median(seconds(read) for _ in range(9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", default="0,1")
    arguments = parser.parse_args()
    cores = {int(core) for core in arguments.cores.split(",")}
    os.sched_setaffinity(0, cores)
    makers = products(len(cores))
    for part, rows in CASES:
        programs = {name: make(part, rows) for name, make in makers.items()}
        for program in programs.values():
            program()
        rounds = [{name: seconds(program) for name, program in programs.items()} for _ in range(arguments.rounds)]
        times = [f"{name} {statistics.median(r[name] for r in rounds) * 1e3:.1f} ms" for name in programs]
        print(part, rows, *times, flush=True)
    rate = bandwidth(len(cores))
    print(f"reading {rate / 1e9:.1f} GB/s: {PARAMETERS * 4 / rate * 1e3:.0f} ms for all parameters")


if __name__ == "__main__":
    main()
