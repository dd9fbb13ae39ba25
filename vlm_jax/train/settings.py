"""The settings class of `config.loop`."""

import dataclasses
from typing import Annotated, Literal

from vlm_jax.ranges import Count, Positive, Range
from vlm_jax.train.guard import GuardSettings
from vlm_jax.train.writers import TENSORBOARD, check_writers


@dataclasses.dataclass(frozen=True)
class LoopSettings(GuardSettings):
    """`config.loop`; further keys are those of `guard.GuardSettings`.

    Attributes:
      save_every: steps between checkpoints; one is also saved at the end of every stage.
      keep: number of newest checkpoints to keep.
      keep_every: also keeps the checkpoints of steps that are a multiple of it; None for none.
      local_copies: a folder of each host's own disk or memory for copies of the state between checkpoints, by Orbax's
        emergency manager: where a host is lost, the run resumes from a copy of the others. For runs whose
        `config.mesh.data` copies of the model have hosts of their own; hosts of the first copy of the model save none.
        None for no copies.
      copy_every: steps between these copies.
      keep_best: a number of the evaluations, by its path in `evaluations.jsonl`, as `accuracy/vqa/mean`: also keeps the
        checkpoint of the evaluated step where it is best, of equal ones the first; None for none.
      best_is: whether the highest or the lowest value of `keep_best` is best.
      log_every: steps between writes of `metrics.jsonl`, which has one line per step, and of a line on the terminal.
      input_workers: processes that load batches; 0 uses a thread of the loop's process. There are
        enough if `input_seconds` in `metrics.jsonl`, the time for which devices waited for a batch, is about 0.
      writers: names of `writers.WRITERS`, which get the numbers of `metrics.jsonl` and of evaluations: `tensorboard`
        writes to `WORKDIR/tensorboard`, `wandb` to Weights & Biases.
      profile: first step and number of steps that the profiler traces into `WORKDIR/profile`; None for none.
      watchdog: seconds within which a process of several that died, or hangs, is named with its step, and the others
        end with status 1; see `train.watchdog`. 0 for no such watch.
      peak_flops: FLOP/s of one device, for `mfu` in `metrics.jsonl`; None for the dense bfloat16 peak of its kind, and
        no `mfu` where that is not known, as for CPUs.
    """

    save_every: Count = 200
    keep: Count = 2
    keep_every: Count | None = None
    local_copies: str | None = None
    copy_every: Count = 20
    keep_best: str | None = None
    best_is: Literal["highest", "lowest"] = "highest"
    log_every: Count = 20
    input_workers: Annotated[int, Range(0, 1024)] = 0
    writers: tuple[str, ...] = (TENSORBOARD,)
    profile: tuple[Count, Count] | None = None
    watchdog: Annotated[float, Range(1, also=0)] = 300.0
    peak_flops: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        check_writers(self.writers)
