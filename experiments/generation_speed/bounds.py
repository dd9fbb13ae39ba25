"""Lower bounds of generation times on a CPU: only the matrix products, and reading the parameters.

Each function takes a model's settings and returns a function for the seconds of a prompt and of the steps after it,
like those of full models in `benchmark.py`. Products run in sequence, each with a separate matrix, and
nothing is computed between them; the head is applied to a prompt's last position.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Shapes = list[tuple[int, int]]  # input and output widths


def widths(settings: dict[str, int]) -> tuple[int, int, int]:
    """Widths of the residual stream, of keys, and inside the MLP."""
    width = settings["hidden_size"]
    key = width // settings["num_attention_heads"] * settings["num_key_value_heads"]
    return width, key, settings["intermediate_size"]


def xla_products(settings: dict[str, int], batch: int, prompt: int, steps: int) -> Callable[[], tuple[float, float]]:
    """In the layout of generation on a CPU: query, key and value are one matrix, gate and up another."""
    import jax
    import jax.numpy as jnp

    width, key, mlp = widths(settings)
    shapes = [(width, width + 2 * key), (width, width), (width, 2 * mlp), (mlp, width)]
    blocks = [[jnp.asarray(matrix) for matrix in drawn(shapes)] for _ in range(settings["num_hidden_layers"])]
    (head,) = map(jnp.asarray, drawn([(width, settings["vocab_size"])]))

    def run(x: Any, blocks: Any, head: Any) -> Any:
        for block in blocks:
            for matrix in block:
                x = matrix @ x[: matrix.shape[1]]
        return x, (head @ x[:, :batch]).max(axis=0, keepdims=True)

    def decode(x: Any, blocks: Any, head: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, x: x + 0 * run(x, blocks, head)[1], x)

    columns, column = jnp.ones((width, batch * prompt)), jnp.ones((width, batch))
    prompts, tokens = (
        jax.jit(function).lower(x, blocks, head).compile() for function, x in ((run, columns), (decode, column))
    )
    return lambda: (
        seconds(lambda: jax.block_until_ready(prompts(columns, blocks, head))),
        seconds(lambda: jax.block_until_ready(tokens(column, blocks, head))),
    )


def torch_products(settings: dict[str, int], batch: int, prompt: int, steps: int) -> Callable[[], tuple[float, float]]:
    """In the layout of Llama in `transformers`."""
    import torch

    width, key, mlp = widths(settings)
    shapes = [(width, width), (width, key), (width, key), (width, width), (width, mlp), (width, mlp), (mlp, width)]
    blocks = [[*map(torch.from_numpy, drawn(shapes))] for _ in range(settings["num_hidden_layers"])]
    (head,) = map(torch.from_numpy, drawn([(width, settings["vocab_size"])]))
    inputs = {width: torch.ones(batch * prompt, width), mlp: torch.ones(batch * prompt, mlp)}

    @torch.inference_mode()
    def run(rows: int) -> None:
        for block in blocks:
            for matrix in block:
                torch.nn.functional.linear(inputs[matrix.shape[1]][:rows], matrix)
        torch.nn.functional.linear(inputs[width][:batch], head)

    return lambda: (
        seconds(lambda: run(batch * prompt)),
        seconds(lambda: [run(batch) for _ in range(steps)]),
    )


def reading(settings: dict[str, int], threads: int, steps: int) -> Callable[[], tuple[float, float]]:
    """Reads all parameters, once for the prompt and once per step, one part per thread."""
    width, key, mlp = widths(settings)
    block = 2 * width * (width + key) + 3 * width * mlp
    size = settings["num_hidden_layers"] * block + width * settings["vocab_size"]
    parts = [np.ones(size // threads, np.float32) for _ in range(threads)]

    def read() -> None:
        running = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    return lambda: (seconds(read), seconds(lambda: [read() for _ in range(steps)]))


def drawn(shapes: Shapes) -> list[np.ndarray]:
    """Random matrices [O, I]."""
    draw = np.random.default_rng(0)
    return [draw.standard_normal((o, i), dtype=np.float32) / np.float32(np.sqrt(i)) for i, o in shapes]


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
