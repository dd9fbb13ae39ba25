"""What a prompt and a step of the benchmark's model take at least on a CPU: its products alone, and reading it."""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

DEPTH, WIDTH, MLP = 12, 768, 2048
KERNELS = [(WIDTH, WIDTH)] * 4 + [(WIDTH, MLP)] * 2 + [(MLP, WIDTH)]
PARAMETERS = 110e6
ROWS = (1, 64, 256, 512, 2048)  # tokens of a step and of prompts


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def products(threads: int) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """The products of all blocks for so many rows, by XLA and by PyTorch, each kernel an array of its own."""
    import jax
    import jax.numpy as jnp
    import torch

    torch.set_num_threads(threads)
    draw = np.random.default_rng(0)
    kernels = [draw.standard_normal(shape, dtype=np.float32) for _ in range(DEPTH) for shape in KERNELS]
    ours = [jnp.asarray(kernel) for kernel in kernels]
    theirs = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels]

    def xla(rows: int) -> Callable[[], Any]:
        given = {width: jnp.full((rows, width), 0.01) for width in (WIDTH, MLP)}
        run = jax.jit(lambda given, kernels: [given[kernel.shape[0]] @ kernel for kernel in kernels])
        compiled = run.lower(given, ours).compile()
        return lambda: jax.block_until_ready(compiled(given, ours))

    def mkl(rows: int) -> Callable[[], Any]:
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
    for rows in ROWS:
        programs = {name: make(rows) for name, make in makers.items()}
        for program in programs.values():
            program()
        rounds = [{name: seconds(program) for name, program in programs.items()} for _ in range(arguments.rounds)]
        print(rows, *(f"{name} {statistics.median(r[name] for r in rounds) * 1e3:.0f} ms" for name in programs))
    rate = bandwidth(len(cores))
    print(f"reading {rate / 1e9:.1f} GB/s: {PARAMETERS * 4 / rate * 1e3:.0f} ms for all parameters")


if __name__ == "__main__":
    main()
