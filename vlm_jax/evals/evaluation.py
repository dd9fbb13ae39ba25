"""The evaluation of any model: questions answered, captions retrieved, or images classified."""

import dataclasses
from collections.abc import Callable, Iterable

from vlm_jax.build import AnyExperiment, Experiment, ImageTextExperiment
from vlm_jax.build.image_text import CAPTIONS
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import RunConfig, parse
from vlm_jax.evals.classification import ClassificationSettings, classification
from vlm_jax.evals.pairs import PairSettings, pairs
from vlm_jax.evals.report import Report
from vlm_jax.evals.vqa import accuracy, answer_all, realised_tokens, tokens_left
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.types import Params, Sample


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model's `config.evaluation` describes.

    Attributes:
      stream: of the data, whose samples are evaluated.
      run: computes the report from parameters and samples.
    """

    stream: str
    run: Callable[[Params, Iterable[Sample]], Report]


def evaluation_of(experiment: AnyExperiment, section: RunConfig) -> Evaluation:
    """The evaluation of an experiment.

    Args:
      experiment: from `build`.
      section: `config.evaluation`.

    Raises:
      ConfigError: an unknown, missing or ill-typed key.
    """
    path = "config.evaluation"
    if isinstance(experiment, Experiment):
        return _of_answers(experiment, parse(EvaluationSettings, section, path))
    if isinstance(experiment.system.model, TwoTower):
        return _of_pairs(experiment, parse(PairSettings, section, path))
    return _of_classes(experiment, parse(ClassificationSettings, section, path))


def _of_answers(experiment: Experiment, settings: EvaluationSettings) -> Evaluation:
    def run(params: Params, samples: Iterable[Sample]) -> Report:
        answers = answer_all(experiment, params, samples, settings)
        # The tokens that enter the decoder; a reducer inside it keeps fewer.
        left, mean = tokens_left(experiment.system.model, answers)
        tokens = {"num_visual_tokens": realised_tokens(answers), "visual_tokens_left": left, "mean_visual_tokens": mean}
        rows = [
            {"id": one.sample.sample_id, "reference": one.sample.answer, "answer": one.text, "correct": one.correct}
            for one in answers
        ]
        return Report(accuracy(answers), rows, tokens)

    return Evaluation("questions", run)


def _of_pairs(experiment: ImageTextExperiment, settings: PairSettings) -> Evaluation:
    return Evaluation(CAPTIONS, lambda params, samples: pairs(experiment, params, samples, settings))


def _of_classes(experiment: ImageTextExperiment, settings: ClassificationSettings) -> Evaluation:
    return Evaluation(CAPTIONS, lambda params, samples: classification(experiment, params, samples, settings))
