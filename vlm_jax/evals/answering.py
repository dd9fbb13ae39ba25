"""Questions as what a run is evaluated by."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from vlm_jax.build import Experiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.evals.evaluator import told, told_scores
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.scores import Scores
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.vqa import METRICS_KEY, answers, check_references
from vlm_jax.types import Dtype, Fields, Params


@dataclasses.dataclass(frozen=True)
class Answering:
    """Generated answers to the last question of every sample of `config.data`'s evaluation.

    Attributes:
      experiment: of the run.
      settings: `config.evaluation`.
      seed: of the run, which draws the samples.
      token_budget: `config.token_budget`.
      dtype: `config.dtype`, in which parameters are used, as those of an exported folder are.
    """

    experiment: Experiment
    settings: EvaluationSettings
    seed: int
    token_budget: int | None
    dtype: str

    @property
    def every(self) -> int | None:
        """`config.evaluation.every`."""
        return self.settings.every

    def check(self) -> None:
        """Raises a SequenceTooLong for a reference answer that no generated answer could equal."""
        references = self.experiment.open_source().references(self.seed)
        check_references(self.experiment.system.processor.tokenizer, references, self.settings.max_new_tokens)

    def rows(self, params: Params) -> Iterator[Fields]:
        """The fields of each `Answer`."""
        samples = self.experiment.open_source().evaluation(self.seed)
        params = cast_floats(params, jnp.dtype(self.dtype))
        for answer in answers(self.experiment, params, samples, self.settings):
            yield {name: list(value) if isinstance(value, tuple) else value for name, value in vars(answer).items()}

    def metrics(self, rows: Iterable[Fields]) -> Fields:
        """Accuracy and values of the metric by task, and visual tokens per image."""
        tally, scores = Tally(), Scores(chosen_metrics(self.settings.metrics, METRICS_KEY))
        for row in rows:
            tally.add(row)
            scores.add(row)
        left, mean = tally.left(self.experiment.system.model)
        return {
            "accuracy": tally.accuracy(),
            "scores": scores.result(),
            "token_budget": self.token_budget,
            "num_visual_tokens": tally.realised(),
            # The tokens that enter the decoder are above; a reducer inside it keeps fewer.
            "visual_tokens_left": left,
            "mean_visual_tokens": mean,
        }

    def lines(self, metrics: Fields) -> list[str]:
        """One line for the visual tokens, one for each task, and one for each value of metrics with several."""
        tokens = metrics["num_visual_tokens"]
        first = f"visual tokens per image: {tokens['mean']} on average, {tokens['max']} at most"
        return [first, *told(metrics["accuracy"]), *told_scores(metrics["scores"])]


def cast_floats(params: Params, dtype: Dtype) -> Params:
    """Parameters in a dtype, on the same devices; those that have it are not copied."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), params)
