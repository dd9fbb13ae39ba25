"""The step of a stage: its loss, its optimizer, and the shapes of its state."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.adapter import LORA
from vlm_jax.build import AnyExperiment
from vlm_jax.leaves import split
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.optim.patterns import Rates, leaf_rates
from vlm_jax.sharding.rules import placed
from vlm_jax.train.guard import Bounds
from vlm_jax.train.stages import Stage
from vlm_jax.train.state import TrainState, init_boxed
from vlm_jax.types import Fields, Params


@dataclasses.dataclass(frozen=True, eq=False)
class StageStep:
    """What the step of a stage is compiled from, but for the shapes of its batch.

    Attributes:
      experiment: of the run.
      stage: of its schedule.
      optimizer: `config.optimizer`.
      bounds: of spikes.
      mesh: devices, which may be those of a topology that this machine does not have.
    """

    experiment: AnyExperiment
    stage: Stage
    optimizer: OptimizerSettings
    bounds: Bounds
    mesh: Mesh

    @functools.cached_property
    def rates(self) -> Rates:
        """Peak learning rates by parameter path; raises a ConfigError for a pattern that matches none."""
        where = f"config.stages.{self.stage.label}"
        boxed = self.experiment.boxed_shapes()
        return leaf_rates(boxed, self.stage.learning_rates, self.stage.layer_decay, where)

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Paths of the trained parameters."""
        return frozenset(self.rates)

    @property
    def settings(self) -> Fields:
        """The arguments of `compile_step` and `trace_step` after state, batch and mesh."""
        parts = {path.removeprefix(f"{LORA}/").split("/")[0] for path in self.trained}
        found: dict[str, Any] = {"objective": self.stage.settings.build(self.experiment, parts)}
        found |= {"tx": self.tx, "trained": self.trained, "accumulate": self.stage.accumulate}
        return found | {"lora": self.experiment.lora, "ema": self.optimizer.ema, "bounds": self.bounds}

    @property
    def tx(self) -> Any:
        """The optimizer of the trained parameters."""
        limits = self.stage.settings.limits
        return adamw(self.optimizer, self.rates, self.stage.warmup_steps, self.stage.steps, limits)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        tx, ema, boxed = self.tx, self.optimizer.ema is not None, self.experiment.boxed_shapes()
        reference = self.stage.settings.reference_shapes(split(boxed, self.trained)[0])

        def init(boxed: Params, reference: Params | None) -> TrainState:
            return init_boxed(boxed, tx, self.trained, reference, ema=ema)

        like = jax.eval_shape(init, boxed, reference)
        return placed(like, self.mesh)
