"""The settings class of `config.loop`."""

import dataclasses

from vlm_jax.config import ConfigError
from vlm_jax.train.guard import GuardSettings
from vlm_jax.train.writers import TENSORBOARD, check_writers


@dataclasses.dataclass(frozen=True)
class LoopSettings(GuardSettings):
    """`config.loop`; further keys are those of `guard.GuardSettings`.

    Attributes:
      save_every: steps between checkpoints; one is also saved at the end of every stage.
      keep: number of newest checkpoints to keep.
      log_every: steps between writes of `metrics.jsonl`, which has one line per step, and of a line on the terminal.
      input_workers: processes that load batches; 0 uses a thread of the loop's process. There are
        enough if `input_seconds` in `metrics.jsonl`, the time for which devices waited for a batch, is about 0.
      writers: names of `writers.WRITERS`, which get the numbers of `metrics.jsonl` and of evaluations: `tensorboard`
        writes to `WORKDIR/tensorboard`, `wandb` to Weights & Biases.
      profile: first step and number of steps that the profiler traces into `WORKDIR/profile`; None for none.
      peak_flops: FLOP/s of one device, for `mfu` in `metrics.jsonl`; None for the dense bfloat16 peak of its kind, and
        no `mfu` where that is not known, as for CPUs.
    """

    save_every: int = 200
    keep: int = 2
    log_every: int = 20
    input_workers: int = 0
    writers: tuple[str, ...] = (TENSORBOARD,)
    profile: tuple[int, int] | None = None
    peak_flops: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for key in ("save_every", "keep", "log_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"config.loop.{key}: expected at least 1, got {getattr(self, key)}")
        check_writers(self.writers)
        if self.profile is not None and min(self.profile) < 1:
            raise ConfigError(
                f"config.loop.profile: expected a first step and a number of steps from 1 on, got {self.profile}"
            )
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ConfigError(f"config.loop.peak_flops: expected FLOP/s above 0, got {self.peak_flops}")
        if self.input_workers < 0:
            raise ConfigError(f"config.loop.input_workers: expected 0 or more, got {self.input_workers}")
