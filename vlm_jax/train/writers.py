"""Where metrics of a run are written: `metrics.jsonl`, and the writers that `config.loop.writers` names."""

import importlib
import importlib.util
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

from vlm_jax.config import ConfigError, RunConfig, did_you_mean, plain
from vlm_jax.paths import is_remote
from vlm_jax.sharding.processes import is_primary
from vlm_jax.train.workdir import MetricsLog
from vlm_jax.types import Fields

LEARNING_RATE = "learning_rate/"  # start of the names of learning rates in a line
TENSORBOARD, WANDB = "tensorboard", "wandb"  # names of writers and of their folders in a workdir
WANDB_ID = "wandb_id"  # file of a workdir, by which a run that resumes is the same one


@runtime_checkable
class Writer(Protocol):
    """Writes scalars of a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step; steps never decrease."""
        ...

    def flush(self) -> None:
        """Returns when all scalars can be read."""
        ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in `WORKDIR/tensorboard`.

    Args:
      workdir: of the run, local or `gs://`.
      config: of the run.
      step: steps done so far; TensorBoard drops what earlier processes have written of later ones.
    """

    def __init__(self, workdir: epath.Path, config: RunConfig, step: int):
        # Here, since they take a fifth of a second to import.
        from tensorboard.compat.proto import event_pb2 as event
        from tensorboard.compat.proto import summary_pb2 as summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        del config
        event_pb2: Any = event  # its classes are made when it is imported
        summary_pb2: Any = summary
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(workdir / TENSORBOARD))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=session))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases, continued when the run is resumed; the environment has its project and account.

    Args:
      workdir: of the run; its name is that of the W&B run, whose id is in `wandb_id`.
      config: of the run.
      step: steps done so far; W&B keeps what it has of later ones, which are repeated with the same numbers.
    """

    def __init__(self, workdir: epath.Path, config: RunConfig, step: int):
        del step
        wandb: Any = importlib.import_module(WANDB)
        path = workdir / WANDB_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        folder = None if is_remote(workdir) else str(workdir)  # else the working directory
        more = {"name": workdir.name, "id": path.read_text(), "resume": "allow", "config": plain(config)}
        self._run = wandb.init(dir=folder, **more)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """W&B uploads by itself."""

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[epath.Path, RunConfig, int], Writer]] = {
    TENSORBOARD: TensorBoardWriter,
    WANDB: WandbWriter,
}


def check_writers(names: Iterable[str]) -> None:
    """Raises a ConfigError for an unknown writer, or one whose package is not installed."""
    for name in names:
        if name not in WRITERS:
            raise ConfigError(f"config.loop.writers: unknown '{name}'{did_you_mean(name, WRITERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"config.loop.writers: {name} is not installed; pip install 'vlm_jax[{name}]', or remove it from the "
                "writers"
            )


def scalars_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested sections by path, as `accuracy/vqa/mean`; texts, None and `step` are left out."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= scalars_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}{name}"] = float(value)
    return found


class RunLog:
    """The log of a run: a line per step in `metrics.jsonl`, the same numbers by the writers.

    Args:
      workdir: of the run.
      config: of the run.
      step: steps done so far; later ones are removed, as by `MetricsLog`.
      writers: names of `WRITERS`; the primary process alone has them.
    """

    def __init__(self, workdir: epath.Path, config: RunConfig, step: int, writers: Sequence[str]):
        self._lines = MetricsLog(workdir, step)
        self._writers = [WRITERS[name](workdir, config, step) for name in writers] if is_primary() else []

    def read(self) -> list[Fields]:
        """All lines so far, including those of earlier processes."""
        return self._lines.read()

    def append(self, lines: Iterable[Fields]) -> None:
        """Appends the lines of steps."""
        lines = list(lines)
        self._lines.append(lines)
        for line in lines:
            self._write(line["step"], scalars_of(line))
        for writer in self._writers:
            writer.flush()

    def add_evaluation(self, step: int, metrics: Fields) -> None:
        """Passes the metrics of an evaluation to the writers."""
        self._write(step, scalars_of(metrics, "evaluation/"))

    def close(self) -> None:
        """Ends the writers."""
        for writer in self._writers:
            writer.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)
