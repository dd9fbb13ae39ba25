"""Runs every runnable config for a few steps through its command line.

A config is runnable when its file defines `get_config` and is not at
`configs/base.py`. It takes the string argument `smoke`, which shrinks its steps and sizes, as in
`--config=configs/x.py:smoke`; a config that does not is a failure.

    python tests/smoke/run.py [PART_OF_A_PATH ...]
"""

import ast
import concurrent.futures
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = pathlib.Path("configs")
TIMEOUT_SECONDS = 600
AT_ONCE = 2  # configs that run side by side: most of a run is compilation, which is on one core
# Compiling is what a few steps cost: as in tests/conftest.py, no costly passes.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false"
XLA_FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
XLA_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = {
    "XLA_FLAGS": XLA_FLAGS,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
}

# Run in a separate process, as a config may import others from the repository root.
ACCEPTS_SMOKE = """
import importlib, sys
get_config = importlib.import_module(sys.argv[1]).get_config
if get_config("smoke").to_json_best_effort() == get_config().to_json_best_effort():
    sys.exit("get_config('smoke') is the same as get_config(): it must shrink steps and sizes")
"""


def runnable_configs() -> list[pathlib.Path]:
    """Paths, relative to the repository root, of every runnable config."""
    found = []
    for path in sorted((ROOT / CONFIGS).rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative == CONFIGS / "base.py":
            continue
        body = ast.parse(path.read_text(), filename=str(relative)).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in body):
            found.append(relative)
    return found


def call(arguments: Sequence[str], log: IO[str]) -> str | None:
    """Runs Python with `arguments` from the repository root and its output in `log`; what went wrong, or None."""
    # A new interpreter finds configs/ and vlm_jax/ from the root, whatever the folder of this script.
    command, environment = [sys.executable, *arguments], {**ENVIRONMENT, **os.environ}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"ran past {TIMEOUT_SECONDS} s"
    return None if done.returncode == 0 else f"exit status {done.returncode}"


def smoke(path: pathlib.Path, log: IO[str]) -> str | None:
    """Runs one config with its output in `log`; returns what went wrong, or None."""
    module = ".".join(path.with_suffix("").parts)
    if problem := call(["-c", ACCEPTS_SMOKE, module], log):
        return f"get_config does not accept 'smoke': {problem}"
    command = "sweep" if CONFIGS / "sweeps" in path.parents else "train"
    with tempfile.TemporaryDirectory(prefix="smoke_") as workdir:
        arguments = ["-m", f"vlm_jax.cli.{command}", f"--config={path}:smoke", f"--workdir={workdir}"]
        arguments.append("--compilation_cache=")  # that of main, which keeps small programs too
        if problem := call(arguments, log):
            return f"vlm_jax.cli.{command}: {problem}"
        if not os.listdir(workdir):
            return f"vlm_jax.cli.{command} left nothing in its workdir"
    return None


def logged_smoke(path: pathlib.Path) -> str | None:
    """Runs one config and then prints its whole output; returns what went wrong, or None."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        problem = smoke(path, log)
        log.seek(0)
        output = log.read()
    seconds = time.monotonic() - start
    print(f"--- {path}\n{output}--- {path}: {problem or 'passed'} in {seconds:.0f} s", flush=True)
    return problem


def main(parts: Sequence[str]) -> int:
    configs = [path for path in runnable_configs() if not parts or any(part in str(path) for part in parts)]
    if not configs:
        print(f"No runnable config under {CONFIGS}/ matches {list(parts) or 'anything'}.", file=sys.stderr)
        return 1
    problems = []
    with tempfile.TemporaryDirectory(prefix="smoke_programs_") as programs:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            for path, problem in zip(configs, pool.map(logged_smoke, configs), strict=True):
                if problem:
                    problems.append(f"{path}: {problem}")
    print("\n".join(problems))
    print(f"{len(configs) - len(problems)} passed, {len(problems)} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
