"""Real processes: the command line in a separate process, to be killed."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = pathlib.Path(__file__).parent / "tiny.py"
_INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
# Python that an interrupt ends: a shell starts what runs in its background with SIGINT ignored, which is inherited.
INTERRUPTIBLE = (sys.executable, "-c", _INTERRUPTIBLE, sys.executable)


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process with so many CPU devices, whose programs are compiled as fast as the tests' own, and once.

    A command with `--compilation_cache=` keeps its programs in the folder of `programs`.
    """
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session", autouse=True)
def programs(request, tmp_path_factory):
    """The compilation cache of all processes that this run of the tests starts, from all its workers.

    The commands' own flag keeps only what took half a second, which few programs of tests do. The cache is not that
    of the tests: a killed process may leave half of an entry, about which JAX warns.
    """
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
        yield


class Command:
    """`python -m vlm_jax.cli.train` on the tiny config, with one device."""

    def start(self, workdir, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        words = [sys.executable, "-m", "vlm_jax.cli.train", f"--config={CONFIG}", f"--workdir={workdir}"]
        words += ["--compilation_cache=", *arguments]
        return subprocess.Popen(
            [*prefix, *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, workdir, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
        """(exit status, what went to standard error)."""
        process = self.start(workdir, *arguments, prefix=prefix)
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors


@pytest.fixture(scope="session")
def command() -> Command:
    return Command()


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    """Returns when `metrics.jsonl` has the step's line."""
    path = workdir / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        if process.poll() is not None:
            raise AssertionError(
                f"the run ended with {process.returncode} before step {step}: {process.communicate()[1]}"
            )
        time.sleep(0.02)
