"""Configs of releases with values of other types, and overrides of a run's config."""

import functools
import random
from typing import Any

import jax.numpy as jnp
import ml_collections

from configs import base
from tests.fuzz.mutation import VALUES, changed_json
from tests.fuzz.target import Target
from vlm_jax.build import build
from vlm_jax.cli.process import EXPLAINED
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import _stand_ins, known_config, known_configs
from vlm_jax.pretrained.loader import choose_family
from vlm_jax.released_json import check_released
from vlm_jax.train.check import check_config
from vlm_jax.train.stages import parse_schedule

FREE = ("stages",)  # sections whose keys are names of the user's own


def _released(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(known_configs())
    return {"name": name, "config": changed_json(rng, known_config(name), 2)}


def _describe(given: dict[str, Any]) -> None:
    config = given["config"]
    check_released(config, "config.json", PretrainedError)  # as at reading
    tensors = _stand_ins(known_config(given["name"]))
    description = choose_family(config, FAMILIES)(config, tensors, dtype=jnp.float32, param_dtype=jnp.float32)
    assert description.rules


@functools.cache
def _paths() -> tuple[str, ...]:
    def below(section: Any, prefix: str) -> list[str]:
        return [
            path
            for key in section
            for path in (
                f"{prefix}{key}",
                *(below(section[key], f"{prefix}{key}.") if hasattr(section[key], "items") else ()),
            )
        ]

    return tuple(below(base.get_config(), ""))


def _overrides(rng: random.Random) -> dict[str, Any]:
    paths = [rng.choice(_paths()) for _ in range(rng.randint(1, 2))]
    if not rng.randrange(4):
        above, _, key = paths[0].rpartition(".")
        place = rng.randrange(len(key))
        paths[0] = f"{above}.{key[:place]}{key[place]}{key[place:]}".lstrip(".")  # a letter twice
    return {path: rng.choice(VALUES) for path in paths}


def _build(overrides: dict[str, Any]) -> None:
    config = base.get_config().unlock()
    for path, value in overrides.items():
        *above, last = path.split(".")
        section: Any = config
        for key in above:
            section = section.get(key, None)
            if not isinstance(section, ml_collections.ConfigDict):
                return
        try:
            with section.ignore_type():
                section[last] = value
        except OverflowError:  # refused by ml_collections
            return
    check_config(config)  # first, as the command does
    build(config)
    parse_schedule(tuple(config.schedule), config.stages)
    misspelt = [path for path in overrides if path not in _paths() and path.rpartition(".")[0] not in FREE]
    assert not misspelt, f"{misspelt} are accepted"


TARGETS = {
    "configs_by_type": Target(_released, _describe, (PretrainedError,)),
    "config_overrides": Target(_overrides, _build, EXPLAINED),
}
