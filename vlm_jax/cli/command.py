"""What the commands that run a config share: its flags, and what is said of a run that ends early."""

import errno
import re
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from vlm_jax.cli.process import explained, keep_programs
from vlm_jax.train.loop import Interrupted

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, and --config.KEY=VALUE to change it.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, local or gs://; made when missing.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a TPU slice or cluster (jax.distributed.initialize)."
)


COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "With --distributed, HOST:PORT of process 0 where JAX does not find it by itself."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address, processes in all.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address, this process, from 0.")


def run(main: Callable[[], object]) -> None:
    """Runs a command's main function; an explained error is one message and exit status 1.

    A run that was asked to stop (SIGTERM) and saved itself exits with status 0.
    """
    flags.mark_flags_as_required(["config", "workdir"])

    parsed = False

    def guarded(argv: list[str]) -> None:
        nonlocal parsed
        parsed = True
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument: {argv[1]}")
        _quieten_checkpoints()
        keep_programs()
        if DISTRIBUTED.value:
            jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        try:
            with explained():
                main()
        except Interrupted as stop:
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"{error}: free space on {WORKDIR.value}; the same command goes on from there", file=sys.stderr)
            sys.exit(1)

    try:
        app.run(guarded)
    except AttributeError as error:
        if parsed:
            raise
        # An override of a key that the config does not have: the error has the key's last part, and a near one.
        words = [word for word in overrides() if word.split("=")[0].split(".")[-1] in str(error)]
        near = re.search(r'Did you mean "(.+?)"', str(error))
        hint = f"; did you mean '{near[1]}'?" if near else ""
        print(f"ConfigError: {' '.join(words)}: the config has no such key{hint}", file=sys.stderr)
        sys.exit(1)


def _quieten_checkpoints() -> None:
    """Leaves a failed save to the one message of its CheckpointError; Orbax reports it once a thread."""
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not ("orbax" in record.pathname or record.name == "asyncio"))


def workdir() -> epath.Path:
    """The folder of the run."""
    return epath.Path(str(WORKDIR.value))


def config_path() -> str:
    """The config file as it was given."""
    return flags.FLAGS["config"].config_filename  # type: ignore[attr-defined]


def overrides() -> tuple[str, ...]:
    """The `--config.KEY=VALUE` arguments as they were given."""
    return tuple(word for word in sys.argv[1:] if word.startswith("--config."))
