"""Flags and error handling shared by the commands that run a config."""

import errno
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from vlm_jax.cli import numbers
from vlm_jax.cli.process import explained, keep_programs, quieten, show_flags
from vlm_jax.config import did_you_mean, parse
from vlm_jax.paths import absolute
from vlm_jax.ranges import Count, Natural
from vlm_jax.train.loop import Interrupted
from vlm_jax.train.settings import LoopSettings

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file; cli.train and cli.plan have that of fine-tuning if unset. --config.KEY=VALUE overrides a key, as "
    "--config.seed=1 or --config.loop.keep=3; --list_keys prints all keys.",
    lock_config=False,
    accept_new_attributes=True,  # keys that the file leaves at their default; `check_config` refuses unknown ones
)


class _Unlocking(ConfigFileFlagParser):
    """Loads a config to which overrides may add keys."""

    def parse(self, path: str) -> Any:
        """The config of a file, or of a file and the argument after its colon.

        Raises:
          flags.Error: the file fails, or an override is in a section that the config does not have.
        """
        try:
            config = super().parse(path)
        except Exception as error:  # anything that a Python file can raise; `parse` wraps some with their traceback
            cause = error.__context__ if isinstance(error, TypeError | ValueError) and error.__context__ else error
            raise flags.Error(f"{_place(path, cause)}: {type(cause).__name__}: {cause}") from error
        if not isinstance(config, ConfigDict):
            return config
        for word in overrides():
            _check_section(config, word)
        return config.unlock()


def _place(path: str, error: BaseException) -> str:
    """A config file, with the line that an error comes from."""
    path, frames = path.partition(":")[0], traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if absolute(frame.filename) == absolute(path)]
    return f"{path}:{lines[-1]}" if lines else path


def _check_section(config: ConfigDict, word: str) -> None:
    """Raises a flags.Error for an override in a section that the config does not have, or of an item of a tuple."""
    section: Any = config
    *sections, last = word.partition("=")[0].split(".")[1:]
    for key in sections:
        if key.endswith("]"):
            return _check_items(section, key, word)
        if not isinstance(section, ConfigDict) or key not in section:
            near = did_you_mean(key, section) if isinstance(section, ConfigDict) else ""
            raise flags.Error(f"{word}: the config has no such section{near}")
        section = section[key]
    if not isinstance(section, ConfigDict):
        raise flags.Error(f"{word}: the config has no such section")
    if last.endswith("]"):
        _check_items(section, last, word)


def _check_items(section: Any, key: str, word: str) -> None:
    """Raises a flags.Error unless a key such as `places[1]` has the item, and the item can be set: of a list."""
    name, *indices = re.findall(r"[^\[\]]+", key)
    value = held = section.get(name) if isinstance(section, ConfigDict) else None
    for index in indices:
        if not isinstance(value, list) or not re.fullmatch(r"\d+", index) or int(index) >= len(value):
            path = word.partition("[")[0]
            raise flags.Error(
                f"{word}: {path.removeprefix('--')} holds {held!r}, of which no item {key.removeprefix(name)} can be "
                f"set; set the whole value, such as {path}=\"('a', 'b')\" for a tuple of texts"
            )
        value = value[int(index)]


flags.FLAGS["config"].parser = _Unlocking(name="config", lock_config=False)
LIST_KEYS = flags.DEFINE_bool("list_keys", False, "Print every key of the config with its value, and exit.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, local or gs://; created if missing.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a TPU slice or cluster (jax.distributed.initialize)."
)


COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "With --distributed, HOST:PORT of process 0 where JAX does not detect it."
)
NUM_PROCESSES = numbers.define("num_processes", Count, None, "With --coordinator_address, the number of processes.")
PROCESS_ID = numbers.define(
    "process_id", Natural, None, "With --coordinator_address, the index of this process, from 0."
)


def run(main: Callable[[], Any], *, default_config: str | None = None, needs_workdir: bool = True) -> None:
    """Runs a command's main function; a user error is printed as one message, with exit status 1.

    A run that was stopped by SIGTERM and saved its state exits with status 0.

    Args:
      main: what the command does.
      default_config: path of the config without `--config`.
      needs_workdir: whether `--workdir` must be given.
    """
    show_flags()
    if default_config is not None and not any(re.match("--?config(=|$)", word) for word in sys.argv[1:]):
        sys.argv.insert(1, f"--config={default_config}")
    flags.mark_flag_as_required("config")
    sys.argv[1:] = opened(sys.argv[1:])

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument: {argv[1]}")
        if LIST_KEYS.value:
            print("\n".join(_keys(CONFIG.value, "--config")))
            return
        if needs_workdir and WORKDIR.value is None:
            raise app.UsageError("--workdir: expected the folder of the run; pass one")
        CONFIG.value.lock()
        keep_programs()
        quieten()
        try:
            with explained():
                if DISTRIBUTED.value:
                    _join()
                main()
        except Interrupted as stop:
            print(f"{stop}; rerun the same command to resume", file=sys.stderr)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"{error}: free space on {WORKDIR.value}, and rerun the same command to resume", file=sys.stderr)
            sys.exit(1)

    app.run(guarded, flags_parser=_parsed)


def _join() -> None:
    """Joins the other processes; JAX notices that one is lost later than the watchdog of a run does."""
    path, config, seconds = "config.loop", CONFIG.value, 100
    if "base" in config:  # a sweep
        path, config = "config.base.loop", config.base
    if "loop" in config:
        seconds = max(seconds, math.ceil(1.2 * parse(LoopSettings, config.loop, path).watchdog))
    joined = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    timeouts: Any = {"heartbeat_timeout_seconds": seconds, "shutdown_timeout_seconds": max(300, seconds)}
    jax.distributed.initialize(*joined, **timeouts)


def opened(words: Sequence[str]) -> list[str]:
    """A command line whose config file is found from any directory, with the modules of its own package.

    `~` in the path of `--config` is the home folder, and the folder above the outermost package that the file is in
    comes first on Python's path.
    """
    found, is_path = list[str](), False
    for word in words:
        flag, path = re.fullmatch("(--?config=|)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        if flag or is_path:
            path = os.path.expanduser(path)
            folder = pathlib.Path(absolute(path)).parent
            while (folder / "__init__.py").exists():
                folder = folder.parent
            sys.path.insert(0, str(folder))
        found.append(flag + path)
        is_path = word in ("--config", "-config")
    return found


def _parsed(argv: list[str]) -> list[str]:
    """Parses flags; an error is printed as one message, without its traceback."""
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value.keys  # a file that does not exist is found missing here
        return rest
    except (flags.Error, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(dict.fromkeys((lines[0], lines[-1]))) if isinstance(error, OSError) else str(error)
        print(f"ConfigError: {said}\nPass --help for the flags", file=sys.stderr)
        sys.exit(1)


def _keys(section: Any, path: str) -> Iterator[str]:
    """`--config.KEY=VALUE` of every key."""
    for key in section:
        value = section[key]
        if hasattr(value, "items"):
            yield from _keys(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}={value}"


def workdir() -> epath.Path:
    """The folder of the run."""
    return epath.Path(absolute(str(WORKDIR.value)))


def config_path() -> str:
    """The path of the config file as given."""
    return flags.FLAGS["config"].config_filename  # type: ignore[attr-defined]


def overrides() -> tuple[str, ...]:
    """The `--config.KEY=VALUE` arguments as given."""
    return tuple(word for word in sys.argv[1:] if word.startswith("--config."))
