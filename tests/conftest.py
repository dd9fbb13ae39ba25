"""What every test runs under: 8 fake CPU devices, strict numerics, no network and no skipped test."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import threading

# Read when JAX starts, so they are before its import. One thread for each kernel: several workers
# share the machine, and the arrays of tests are small.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
# Compilation is the main cost of tests, and fast kernels are useless for small arrays: no costly LLVM passes, one LLVM
# module per program, no emitter of fused kernels. A tenth of the time of XLA's own settings.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # jaxlib 0.12 aborts at a flag that it does not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
from absl import flags
from flax.core import meta
from flax.core.scope import Scope
from flax.errors import ScopeParamShapeError
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lru_cache import LRUCache  # no public way to write entries whole

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Files that take long, from the dearest on: begun last, one would keep a worker busy after all others are idle.
FIRST = (
    "tests/train/test_evaluation.py",
    "tests/train/",
    "tests/sweep/",
    "tests/contracts/",
    "tests/parity/test_lmms_eval.py",
    "tests/parity/test_training_benchmark.py",
    "tests/parity/test_generation_benchmark.py",
    "tests/processes/test_siglip.py",
    "tests/processes/test_fine_tune.py",
    "tests/processes/test_two_processes.py",
    "tests/processes/test_notebooks.py",
    "tests/processes/test_kill.py",
    "tests/processes/test_generate.py",
    "tests/processes/test_input_workers.py",
)


def configure_jax() -> None:
    """Strict rank promotion, full-precision products, and a compilation cache of all workers that outlives the run."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ROOT / ".cache" / "jax"))
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    LRUCache.put = put_whole


def put_whole(cache: LRUCache, key: str, value: bytes) -> None:
    """Adds an entry to the compilation cache, whole as soon as it has its name.

    JAX writes in place, and another worker that shares the folder could read half of an entry.
    """
    entry = pathlib.Path(str(cache.path)) / f"{key}-cache"
    if not entry.exists():
        part = entry.with_name(f"{key}.{os.getpid()}-{threading.get_ident()}")
        part.write_bytes(value)
        part.replace(entry)


def trace_cheaply() -> None:
    """Removes costs of tracing and lowering that no test needs; together a fifth of the processor time of the suite.

    Python's garbage collector would search the many live objects of a trace every 700 allocations. JAX would record the
    Python stack, which is deep under pytest, Flax and jaxtyping, for every operation, and make an MLIR context with
    all dialects for every program, however small.
    """
    gc.set_threshold(100_000, 20, 20)
    xla_client.Traceback.enabled = False
    contexts, make = threading.local(), mlir.make_ir_context

    @functools.wraps(make)
    def make_once():
        # Types, attributes and constants stay in a context, so it serves a number of a thread's programs only.
        if getattr(contexts, "left", 0) == 0:
            contexts.shared, contexts.left = make(), 200
        contexts.left -= 1
        return contexts.shared

    mlir.make_ir_context = make_once
    Scope.param = functools.partialmethod(param, Scope.param)


def param(scope: Scope, traced, name: str, init_fn, *arguments, unbox: bool = True, **options):
    """`Scope.param`, which traces `init_fn` in every pass of a module only to compare the shape of the parameter.

    An initialiser of `vlm_jax.layers.dense.with_axes` says the shape in its first argument.
    """
    shaped = isinstance(init_fn, functools.partial) and arguments and isinstance(arguments[0], tuple)
    if not shaped or not scope.has_variable("params", name):
        return traced(scope, name, init_fn, *arguments, unbox=unbox, **options)
    scope.reserve(name, "params")
    value = scope.get_variable("params", name)
    shape = np.shape(meta.unbox(value))
    if shape != arguments[0]:
        raise ScopeParamShapeError(name, scope.path_text, shape, arguments[0])
    return meta.unbox(value) if unbox else value


configure_jax()
trace_cheaply()
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which no command line sets here


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skipped, or expectedly failing, test or file into a failure that says so."""
    reason = getattr(report, "wasxfail", None)
    if not report.skipped and reason is None:
        return
    kind = "skipped" if reason is None else "expected to fail"
    if reason is None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    else:
        del report.wasxfail  # type: ignore[union-attr]
    report.outcome = "failed"
    report.longrepr = (
        f"{report.nodeid} was {kind} ({reason}). No test is skipped here: repair it, remove it, or move "
        "it to a suite of its own with a make target."
    )


def pytest_collection_modifyitems(items):
    """Files in the order of `FIRST`, which `--no-loadscope-reorder` hands to the workers."""
    items.sort(key=lambda item: next((i for i, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    report = yield
    fail_if_skipped(report)
    return report


@pytest.fixture(scope="session")
def one_device():
    """A mesh of the first device."""
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh  # here, where jaxtyping's checks are switched on

    return make_mesh(MeshSettings(data=1), jax.devices()[:1])
