"""Measured time of prefill and decoding, beside what is counted in FLOPs."""

import itertools
import statistics
import time
from collections.abc import Iterable

from vlm_jax.build import Experiment
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.evals.vqa import KEYS
from vlm_jax.types import Params, Sample

REPEATS = 3


def generation_seconds(
    experiment: Experiment, params: Params, samples: Iterable[Sample], settings: EvaluationSettings
) -> dict[str, float]:
    """Time of the batch of the first samples, as it is answered by `vqa.answers`, divided by its examples.

    Args:
      experiment: whose model is timed.
      params: its parameters, on their devices.
      samples: the first `batch_size` fill the batch, repeated where there are fewer.
      settings: `config.evaluation`.

    Returns:
      Seconds per example: `prefill_seconds` of the pictures, the prompt and the first new token, `decode_seconds` of
      every new token after it. Both are medians of three runs, so that the time to compile in the first one does not
      count. `decode_seconds` is left out where all answers are of one token.
    """
    system, shape, size = experiment.system, experiment.prompt, settings.batch_size
    few = list(itertools.islice(samples, size))
    examples = [experiment.example(sample, targets=False) for sample in few]
    filled = list(itertools.islice(itertools.cycle(examples), size))
    prompts = system.processor.rows([[example] for example in filled], shape, targets=False, keys=KEYS)
    params = system.prepared(params)
    length, most = prompts.tokens.shape[1], settings.max_new_tokens

    def measured(num_tokens: int) -> tuple[float, int]:
        """Seconds of the batch, and the tokens of its longest answer."""
        taken, longest = [], 0
        for _ in range(REPEATS):
            since = time.perf_counter()
            answers = system.complete(
                params,
                prompts,
                max_new_tokens=num_tokens,
                names=[example.name for example in filled],
                buckets=(length,),
                cache_length=length + most - 1,  # one program of the prompt for both
            )
            taken.append(time.perf_counter() - since)
            longest = max(len(answer.tokens) for answer in answers)
        return statistics.median(taken), longest

    prefill, _ = measured(1)
    whole, longest = measured(most)
    times = {"prefill_seconds": prefill / size}
    if longest > 1:
        times["decode_seconds"] = max(whole - prefill, 0.0) / (longest - 1) / size
    return times
