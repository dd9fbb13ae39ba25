"""The evaluator of each kind of model."""

from collections.abc import Callable, Mapping

from flax import linen as nn

from vlm_jax.build import AnyExperiment, Experiment, ImageTextExperiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import RunConfig, parse
from vlm_jax.evals.answering import Answering
from vlm_jax.evals.classification import ClassificationSettings, Classifying
from vlm_jax.evals.evaluator import Evaluator
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.pairs import Matching, PairSettings
from vlm_jax.evals.vqa import METRICS_KEY
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM

PATH = "config.evaluation"


def _answering(experiment: AnyExperiment, config: RunConfig) -> Evaluator:
    assert isinstance(experiment, Experiment)
    settings = parse(EvaluationSettings, config.evaluation, PATH)
    chosen_metrics(settings.metrics, METRICS_KEY)
    return Answering(experiment, settings, config.seed, config.token_budget, config.dtype)


def _matching(experiment: AnyExperiment, config: RunConfig) -> Evaluator:
    assert isinstance(experiment, ImageTextExperiment)
    return Matching(experiment, parse(PairSettings, config.evaluation, PATH), config.seed)


def _classifying(experiment: AnyExperiment, config: RunConfig) -> Evaluator:
    assert isinstance(experiment, ImageTextExperiment)
    return Classifying(experiment, parse(ClassificationSettings, config.evaluation, PATH), config.seed)


# Class of a model -> what makes its evaluator.
EVALUATORS: Mapping[type[nn.Module], Callable[[AnyExperiment, RunConfig], Evaluator]] = {
    VLM: _answering,
    TwoTower: _matching,
    Classifier: _classifying,
}


def evaluator_of(experiment: AnyExperiment, config: RunConfig) -> Evaluator:
    """The evaluator of an experiment's kind of model, by `config.evaluation`.

    Raises:
      ConfigError: an unknown, missing or ill-typed key, or an unknown metric.
    """
    return EVALUATORS[type(experiment.system.model)](experiment, config)
