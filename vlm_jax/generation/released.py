"""Generation settings of a release: what of `generation_config.json` is followed, and what is told instead."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.released_json import read_released
from vlm_jax.types import Config, Fields

FILE = "generation_config.json"
# Settings that are followed: here, or as the ids of tokens by the processor.
FOLLOWED = ("repetition_penalty", "no_repeat_ngram_size", "eos_token_id", "pad_token_id", "bos_token_id")
# Settings that `generate` always takes from its own arguments, which take precedence in transformers too.
ARGUMENTS = ("max_new_tokens", "max_length", "max_time", "num_return_sequences", "use_cache", "cache_implementation")
# Settings of sampling, which have no effect on the most likely token.
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Settings that change the tokens of greedy answers, and are not followed -> values without an effect.
NOT_FOLLOWED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None, {}),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1),
    "stop_strings": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
    "remove_invalid_values": (None, False),
}


def greedy_sampling(folder: Path) -> Sampling:
    """How the most likely tokens are selected by default: with the release's penalty of repetitions, and its n-grams.

    Those are `repetition_penalty` and `no_repeat_ngram_size` of the file.

    Answers are greedy by default, also of a release that samples. That, and each setting that is not followed, is told
    by a warning.

    Raises:
      GenerationError: a value of another form.
    """
    path = folder / FILE
    settings = read_released(path, GenerationError) if path.exists() else {}
    if told := [*_sampled(settings), *_others(settings)]:
        warnings.warn(f"{path}: {'; '.join(told)}", stacklevel=2)
    return Sampling(**_of_greedy(settings))


def _of_greedy(settings: Config) -> Fields:
    """The settings that change greedy answers too, as arguments of `Sampling`, without those that ask for nothing."""
    names = {"repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram"}
    return {own: settings[key] for key, own in names.items() if settings.get(key)}


def _sampled(settings: Config) -> list[str]:
    if not settings.get("do_sample"):
        return []
    given = {
        "temperature": 1.0,
        "top_k": 50,
        **{key: settings[key] for key in SAMPLED if settings.get(key) is not None},
    }
    own = {key: value for key, value in given.items() if key in ("temperature", "top_k", "top_p") and value}
    own |= _of_greedy(settings)
    call = ", ".join(f"{key}={value}" for key, value in own.items())
    return [f"the release samples (do_sample); answers here are greedy by default, pass sampling=Sampling({call})"]


def _others(settings: Config) -> list[str]:
    return [
        f"{key}={settings[key]!r} is not followed"
        for key, neutral in NOT_FOLLOWED.items()
        if key in settings and settings[key] not in neutral
    ]
