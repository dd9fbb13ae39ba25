"""Setup of every command's process: the compilation cache, and errors as one message."""

import contextlib
import io
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.config import ConfigError
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.data.packing import StalePlan
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.evals.paired import DifferentQuestions
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.paths import absolute
from vlm_jax.planner.topology import PlanError
from vlm_jax.plugins import PluginError
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.plain_prompt import UnknownText
from vlm_jax.processors.spelled_prompt import PromptError
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.sweep.on_processes import ProcessLost
from vlm_jax.sweep.on_ray import WorkerLost
from vlm_jax.system import UnsupportedError
from vlm_jax.train.lock import WorkdirInUse
from vlm_jax.train.loop import Diverged
from vlm_jax.train.workdir import WorkdirError

# Errors whose message is for the user, without a traceback.
EXPLAINED = (
    ChatTemplateError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatch,
    ConfigError,
    CorruptImage,
    DifferentQuestions,
    Diverged,
    GenerationError,
    InfeasibleBudget,
    InfeasibleGrid,
    MalformedRecords,
    PictureMismatch,
    PlanError,
    PluginError,
    PretrainedError,
    ProcessLost,
    PromptError,
    SequenceTooLong,
    StalePlan,
    TokenizerError,
    TooManyCorruptImages,
    UnknownText,
    UnsupportedError,
    WorkdirError,
    WorkdirInUse,
    WorkerLost,
)

CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/vlm_jax/xla", "Folder of the persistent compilation cache; empty for none."
)


def show_flags() -> None:
    """Makes `--help` show the flags of all modules of the command line, not only those of the command's own."""
    for name in [name for name in sys.modules if name.startswith("vlm_jax.cli.")]:
        for flag in flags.FLAGS.get_key_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def keep_programs() -> None:
    """Enables the compilation cache in the folder of `--compilation_cache`."""
    if CACHE.value:
        jax.config.update("jax_compilation_cache_dir", absolute(CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def quieten() -> None:
    """Shows this package's messages, of others warnings; none of Orbax, whose failures a CheckpointError reports."""
    escape_unprintable()
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    absl_logging.get_absl_handler().addFilter(lambda one: not ("orbax" in one.pathname or one.name == "asyncio"))
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _without_closed_loops(hook: Callable[..., object]) -> Callable[..., object]:
    """A hook for exceptions in callbacks, silent about those of TensorStore that end after a save or a read failed."""

    def show(args: Any) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            hook(args)

    return show


def escape_unprintable() -> None:
    """Makes the output print a character that its encoding lacks as an escape, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def explained(*more: type[Exception]) -> Iterator[None]:
    """Prints a user error, or one of `more`, as its message with exit status 1; Ctrl-C has status 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as in shells
    except (*EXPLAINED, *more) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
