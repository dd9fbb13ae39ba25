"""Prefill and decode of a Llama compared with `transformers`, and compile time by depth; see README.md.

Every contender has a separate process, on the same cores, and they alternate, one generation each per round,
while the others sleep. Lower bounds of their times are measured too (`bounds.py`).
"""

import argparse
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
from bounds import reading, torch_products, xla_products

# 110 M parameters, the head tied to the embedding table.
LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "vocab_size": 32_000, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512}  # fmt: skip
CASES = tuple((batch, prompt) for batch in (1, 8) for prompt in (64, 256, 1024))
TINY_CASES = ((2, 32),)
DEPTHS, TINY_DEPTHS = (4, 28), (1, 2)
PHASES = ("prefill", "decode")
OURS, THEIRS, XLA, PYTORCH, READING = "ours", "theirs", "XLA's products", "PyTorch's products", "reading"

# The prompts -> the new tokens, and the seconds of the prompt and of all tokens after the first.
Generate = Callable[[np.ndarray], tuple[np.ndarray, float, float]]


def ours(folder: str, new_tokens: int) -> Generate:
    """The public engine, timed by its reports."""
    import vlm_jax
    from vlm_jax.generation.engine import generate, prepared
    from vlm_jax.types import TEXT_SLOT, Batch

    pretrained = vlm_jax.from_pretrained(folder)
    model, params = pretrained.module, prepared(pretrained.params)

    def run(ids: np.ndarray) -> tuple[np.ndarray, float, float]:
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32)[None], ids.shape)
        batch = Batch(
            tokens=ids,
            positions=positions,
            segment_ids=np.ones_like(ids),
            visual_index=np.full_like(ids, TEXT_SLOT),
        )
        times = [time.perf_counter()]

        def watch(new: np.ndarray, counts: np.ndarray) -> np.ndarray:
            times.append(time.perf_counter())
            return np.zeros(len(counts), bool)

        options = {"max_new_tokens": new_tokens, "chunk": new_tokens - 1, "buckets": (ids.shape[1],)}
        generated = generate(model, params, batch, watch=watch, **options)
        return generated.tokens, times[1] - times[0], times[2] - times[1]

    return run


def theirs(folder: str, new_tokens: int, threads: int) -> Generate:
    """A plain greedy loop over the model of `transformers` with its static cache."""
    import torch
    from transformers import LlamaForCausalLM, StaticCache

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(ids: np.ndarray) -> tuple[np.ndarray, float, float]:
        length = ids.shape[1]
        start = time.perf_counter()
        cache = StaticCache(config=model.config, max_cache_len=length + new_tokens)
        given = {"cache": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(torch.from_numpy(ids).long(), cache_position=torch.arange(length), **given).logits
        tokens = [logits[:, -1].argmax(-1, keepdim=True)]
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            logits = model(tokens[-1], cache_position=torch.tensor([length + step]), **given).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        end = time.perf_counter()
        return torch.cat(tokens, dim=1).numpy(), first - start, end - first

    return run


def released_folder(folder: str, settings: dict[str, int]) -> None:
    """A checkpoint with random weights, written by `transformers`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**settings, tie_word_embeddings=True, initializer_range=0.05)
    LlamaForCausalLM(config).save_pretrained(folder)


def serve(pipe: Connection, name: str, folder: str, new_tokens: int, cores: set[int]) -> None:
    """A contender's process: one generation per request."""
    os.sched_setaffinity(0, cores)
    run = contender(name, folder, new_tokens, len(cores))
    while (ids := pipe.recv()) is not None:
        pipe.send(run(ids))


def contender(name: str, folder: str, new_tokens: int, threads: int) -> Generate:
    if name == OURS:
        return ours(folder, new_tokens)
    if name == THEIRS:
        return theirs(folder, new_tokens, threads)
    settings, steps = json.loads((Path(folder) / "config.json").read_text()), new_tokens - 1
    if name == PYTORCH:
        import torch

        torch.set_num_threads(threads)
    made: dict[tuple[int, ...], Callable[[], tuple[float, float]]] = {}

    def run(ids: np.ndarray) -> tuple[np.ndarray, float, float]:
        """The bound for these prompts' shape; that of the previous shape is freed, because it holds matrices."""
        if ids.shape not in made:
            made.clear()
            made[ids.shape] = (
                reading(settings, threads, steps)
                if name == READING
                else (xla_products if name == XLA else torch_products)(settings, *ids.shape, steps)
            )
        return np.zeros((len(ids), 0), np.int32), *made[ids.shape]()

    return run


def first_call(pipe: Connection, folder: str, prompt: np.ndarray, new_tokens: int, cores: set[int]) -> None:
    """First minus second generation time: for tracing and compiling the programs."""
    os.sched_setaffinity(0, cores)
    run, times = ours(folder, new_tokens), []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        run(prompt)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    pipe.send([first - second for first, second in zip(*times, strict=True)])


def in_process(target: Callable[..., None], *arguments: Any) -> Any:
    """The result of a function in a separate process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    answer = here.recv()
    process.join()
    return answer


def prompt_of(settings: dict[str, int], batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, settings["vocab_size"], size=(batch, length), dtype=np.int32)


class Contenders:
    """The processes, started with the first request."""

    NAMES = (OURS, THEIRS, XLA, PYTORCH, READING)

    def __init__(self, settings: dict[str, int], new_tokens: int, cores: set[int]):
        self._settings, self._new_tokens, self._cores = settings, new_tokens, cores
        self._pipes: dict[str, Connection] = {}

    def row(self, batch: int, length: int, rounds: int) -> dict[str, Any]:
        """Seconds of every round of one case, and the share of equal tokens."""
        if not self._pipes:
            self._start()
        ids = prompt_of(self._settings, batch, length)
        tokens = {name: self._ask(name, ids)[0] for name in self.NAMES}
        seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in self.NAMES}
        for number in range(rounds):
            for name in self.NAMES if number % 2 else reversed(self.NAMES):
                for phase, measured in zip(PHASES, self._ask(name, ids)[1:], strict=True):
                    seconds[name][phase].append(measured)
        same = float(np.mean(np.cumprod(tokens[OURS] == tokens[THEIRS], axis=1)))
        row = {"batch": batch, "prompt": length, "new_tokens": self._new_tokens, "same": same, "seconds": seconds}
        return row

    def end(self) -> None:
        for pipe in self._pipes.values():
            pipe.send(None)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        maker = context.Process(target=released_folder, args=(folder, self._settings))
        maker.start()
        maker.join()
        for name in self.NAMES:
            self._pipes[name], there = context.Pipe()
            arguments = (there, name, folder, self._new_tokens, self._cores)
            context.Process(target=serve, args=arguments, daemon=True).start()

    def _ask(self, name: str, ids: np.ndarray) -> Any:
        self._pipes[name].send(ids)
        return self._pipes[name].recv()


def compile_row(settings: dict[str, int], depth: int, batch: int, rounds: int, cores: set[int]) -> dict[str, Any]:
    """Seconds for compiling both programs at a depth, one process per round; wall time, and CPU time of all threads."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        maker = context.Process(target=released_folder, args=(folder, {**settings, "num_hidden_layers": depth}))
        maker.start()
        maker.join()
        prompt = prompt_of(settings, batch, 16)
        seconds = [in_process(first_call, folder, prompt, 4, cores) for _ in range(rounds)]
    return {"depth": depth, "batch": batch, "wall": [s[0] for s in seconds], "cpu": [s[1] for s in seconds]}


def table(rows: list[dict[str, Any]]) -> str:
    """Medians of the rounds, in Markdown; milliseconds per prompt, and per step after it."""
    lines = []
    measured = sorted((row for row in rows if "prompt" in row), key=lambda row: (row["batch"], row["prompt"]))
    for phase in PHASES:
        head = ["batch", "prompt", *Contenders.NAMES, "theirs / ours", "same tokens"]
        lines += [f"{phase}, ms", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in measured:
            steps = 1 if phase == "prefill" else row["new_tokens"] - 1
            median = {name: statistics.median(row["seconds"][name][phase]) / steps * 1e3 for name in Contenders.NAMES}
            times = [f"{median[name]:.1f}" for name in Contenders.NAMES]
            cells = [row["batch"], row["prompt"], *times, f"{median[THEIRS] / median[OURS]:.2f}", f"{row['same']:.0%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    compiled = sorted((row for row in rows if "depth" in row), key=lambda row: (row["batch"], row["depth"]))
    lines += ["| batch | layers | first call, s | CPU seconds | of the shallower |", "|---" * 5 + "|"]
    base: dict[int, float] = {}
    for row in compiled:
        wall, cpu = statistics.median(row["wall"]), statistics.median(row["cpu"])
        base.setdefault(row["batch"], wall)
        lines.append(f"| {row['batch']} | {row['depth']} | {wall:.2f} | {cpu:.2f} | {wall / base[row['batch']]:.2f} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Speedup by prompt length; one panel per phase, one line per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, len(PHASES), figsize=(10, 4), sharey=True)
    for panel, phase in zip(panels, PHASES, strict=True):
        for batch in sorted({row["batch"] for row in rows if "prompt" in row}):
            points = sorted(
                (row["prompt"], *(statistics.median(row["seconds"][n][phase]) for n in (THEIRS, OURS)))
                for row in rows
                if row.get("prompt") and row["batch"] == batch
            )
            panel.plot([p[0] for p in points], [p[1] / p[2] for p in points], marker="o", label=f"batch {batch}")
        panel.axhline(1, color="grey", linewidth=1)
        panel.set(xscale="log", xlabel="tokens of the prompt", title=phase)
        ticks = sorted({row["prompt"] for row in rows if "prompt" in row})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times as fast as transformers")
    panels[-1].legend()
    canvas.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=33, help="of every generation, including the first")
    parser.add_argument("--cores", default="0,1", help="cores for all processes")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the program")
    parser.add_argument("--out", type=Path, default=Path("workdir/generation_speed"))
    arguments = parser.parse_args()
    cores = {int(core) for core in arguments.cores.split(",")}
    os.sched_setaffinity(0, cores)
    settings, cases, depths = (TINY, TINY_CASES, TINY_DEPTHS) if arguments.tiny else (LLAMA, CASES, DEPTHS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.json"  # existing rows are not measured again
    rows = json.loads(file.read_text()) if file.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        file.write_text(json.dumps(rows, indent=1))
        print(json.dumps(row), flush=True)

    contenders = Contenders(settings, arguments.new_tokens, cores)
    for batch, prompt in cases:
        if not any((row.get("prompt"), row["batch"]) == (prompt, batch) for row in rows):
            add(contenders.row(batch, prompt, arguments.rounds))
    contenders.end()
    for batch in sorted({batch for batch, _ in cases}):
        for depth in depths:
            if not any((row.get("depth"), row["batch"]) == (depth, batch) for row in rows):
                add(compile_row(settings, depth, batch, arguments.rounds, cores))
    (arguments.out / "table.md").write_text(table(rows) + "\n")
    figure(rows, arguments.out / "speed.png")
    print(table(rows))


if __name__ == "__main__":
    main()
