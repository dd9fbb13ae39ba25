"""Checks of a run's whole config before any part of it is built."""

from vlm_jax.adapter import LoraSettings
from vlm_jax.build.sections import check_model, check_values
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import RunConfig, choose
from vlm_jax.evals.classification import ClassificationSettings
from vlm_jax.evals.pairs import PairSettings
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stages import Stage

SETTINGS = {"lora": LoraSettings, "optimizer": OptimizerSettings, "loop": LoopSettings, "mesh": MeshSettings}


def check_config(config: RunConfig, *, unset: bool = False) -> None:
    """Checks every value of a config against its type and range; relations between them are checked by what reads them.

    Args:
      config: a run's config.
      unset: whether a key may be None until it is chosen, as in `train.finetuning`.

    Raises:
      ConfigError: an unknown or missing key, a value of another type or outside its range.
    """
    check_model(config, unset=unset)
    check_training(config, unset=unset)


def check_training(config: RunConfig, *, unset: bool = False) -> None:
    """The part of `check_config` that is about training and evaluation, not the model; raises alike."""
    for key, cls in SETTINGS.items():
        check_values(cls, config[key], f"config.{key}", unset=unset)
    check_values(_evaluation(config), config.evaluation, "config.evaluation", unset=unset)
    for label, stage in config.stages.items():
        path = f"config.stages.{label}"
        check_values(Stage, stage, path, unset=unset)
        if "objective" in stage:
            check_values(choose(OBJECTIVES, stage["objective"], f"{path}.objective"), stage, path, unset=unset)


def _evaluation(config: RunConfig) -> type:
    """The settings class of `config.evaluation`; of a release without answers the one with the most keys."""
    if config.release is not None:
        return EvaluationSettings if "length" in config.row else PairSettings
    kinds: dict[str, type] = {"text_tower": PairSettings, "class_head": ClassificationSettings}
    return kinds.get(config.decoder.get("kind"), EvaluationSettings)
