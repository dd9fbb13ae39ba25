"""Host memory and time of loading a released folder of 2 GB; see README.md for the question and the result.

    python experiments/loading_memory/benchmark.py --rounds 3

Every load is a separate process; contenders alternate within a round. The folder is written to a temporary directory
by `transformers`, in the schema of Qwen2-VL, and removed afterwards.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Qwen/Qwen2-VL-2B-Instruct with 16 of its tower's 32 layers and 10 of its 28; other values are the class's defaults.
CONFIG = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 10, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 16, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
}  # fmt: skip
SMALL = {
    **CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": 8192,
    "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2},
}  # fmt: skip
DEVICES = 8
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def write_folder(folder: str, config: dict[str, Any], shard: str) -> None:
    """A seeded model of `config` in bfloat16, in shards."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    text = {key: value for key, value in config.items() if key not in ("vision_config", "tie_word_embeddings")}
    described = Qwen2VLConfig(
        text_config=text, vision_config=config["vision_config"], tie_word_embeddings=config["tie_word_embeddings"]
    )
    described.dtype = torch.bfloat16
    torch.set_default_dtype(torch.bfloat16)
    Qwen2VLForConditionalGeneration(described).save_pretrained(folder, max_shard_size=shard)


def ours(folder: str, dtype: str, *, sharded: bool) -> Callable[[], tuple[Any, int]]:
    """`vlm_jax.from_pretrained` on one device, or over a mesh of eight."""
    import jax

    import vlm_jax
    import vlm_jax.pretrained  # the package imports it lazily
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh

    mesh = make_mesh(MeshSettings(**MESH)) if sharded else None
    jax.block_until_ready(jax.device_put(0))

    def load() -> tuple[Any, int]:
        model = vlm_jax.from_pretrained(folder, dtype=dtype, mesh=mesh)
        jax.block_until_ready(model.params)
        shards = [shard.data for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards]
        return model, sum(shard.nbytes for shard in shards)

    return load


def theirs(folder: str, dtype: str) -> Callable[[], tuple[Any, int]]:
    """`from_pretrained` of `transformers`, which always loads into modules on the meta device."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    def load() -> tuple[Any, int]:
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        return model, sum(parameter.nbytes for parameter in model.parameters())

    return load


def library(folder: str) -> Callable[[], tuple[Any, int]]:
    """Only `safetensors`: every file's tensors as NumPy arrays."""
    import ml_dtypes  # noqa: F401 (names bfloat16)
    from safetensors.numpy import load_file

    def load() -> tuple[Any, int]:
        tensors = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
        return tensors, sum(tensor.nbytes for file in tensors for tensor in file.values())

    return load


CONTENDERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "ours, one device, bfloat16": (ours, ("bfloat16",), {"sharded": False}),
    "ours, 8 devices, bfloat16": (ours, ("bfloat16",), {"sharded": True}),
    "ours, one device, float32": (ours, ("float32",), {"sharded": False}),
    "ours, 8 devices, float32": (ours, ("float32",), {"sharded": True}),
    "`transformers`, bfloat16": (theirs, ("bfloat16",), {}),
    "`transformers`, float32": (theirs, ("float32",), {}),
    "`safetensors` alone": (library, (), {}),
}


def memory(field: str) -> int:
    """A field of the process's status in bytes: VmRSS, RssAnon (its own), VmHWM (maximum VmRSS since `forget_peak`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, folder: str, results: Any) -> None:
    """Loads once, in this process, and reports memory and time."""
    make, arguments, settings = CONTENDERS[name]
    load = make(folder, *arguments, **settings)
    resident, own = memory("VmRSS"), memory("RssAnon")
    most_own, done = [own], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            most_own[0] = max(most_own[0], memory("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    forget_peak()
    start = time.perf_counter()
    model, held = load()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    results.put({"seconds": seconds, "result": held, "peak": memory("VmHWM") - resident, "own": most_own[0] - own})
    del model


def in_a_process(target: Any, *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__}{arguments} ended with {process.exitcode}")


def sizes(folder: str) -> tuple[int, dict[str, int]]:
    """Bytes of all tensors of the folder, and of its largest in each dtype."""
    from vlm_jax.checkpoints.hub import open_checkpoint

    tensors = open_checkpoint(folder).values()
    largest = max(tensor.nbytes for tensor in tensors)
    return sum(tensor.nbytes for tensor in tensors), {"bfloat16": largest, "float32": 2 * largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a folder of a few megabytes, to try the script")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        in_a_process(write_folder, folder, SMALL if arguments.small else CONFIG, "10MB" if arguments.small else "500MB")
        total, largest = sizes(folder)
        print(f"tensors {total / 1e9:.2f} GB, largest as stored {largest['bfloat16'] / 1e9:.3f} GB")
        results = multiprocessing.get_context("spawn").SimpleQueue()
        for _ in range(arguments.rounds):
            for name in CONTENDERS:
                in_a_process(measure, name, folder, results)
                found[name].append(results.get())
    print(
        "| load | seconds | GB/s read | result, GB | peak, GB | of that its own | over the result, in largest tensors |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        worst = max(runs, key=lambda run: run["peak"])
        over = (worst["peak"] - worst["result"]) / largest["bfloat16"]
        print(
            f"| {name} | {seconds:.2f} | {total / seconds / 1e9:.2f} | {worst['result'] / 1e9:.2f} | "
            f"{worst['peak'] / 1e9:.2f} | {worst['own'] / 1e9:.2f} | {over:.2f} |"
        )
    print(json.dumps({name: [round(run["seconds"], 2) for run in runs] for name, runs in found.items()}))


if __name__ == "__main__":
    main()
