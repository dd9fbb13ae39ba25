"""The config of a fine-tuning run of any release, as a file for `--config`: every key, with those to choose as None.

`first_run.completed` chooses the keys that are None from the release, the data and the devices.
"""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlm_jax.adapter import LORA, LoraSettings
from vlm_jax.build.settings import EvaluationSettings, RowSettings
from vlm_jax.data import Conversations
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.pretrained.configured import ReleaseProcessorSettings
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stages import Stage

PARTS = ("connector", "decoder")  # that learn; LLaVA-1.5, section 3.1


def section(cls: type[Any], **values: Any) -> ConfigDict:
    """A section with every key of a settings class, at `values` or its default; `type` is to be chosen, or given."""
    hints, found = typing.get_type_hints(cls), ConfigDict()
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is not dataclasses.MISSING:
            found[field.name] = placeholder(_kind(hints[field.name])) if value is None else value
    return found


def _kind(hint: Any) -> type:
    """The type of a value other than None."""
    options = [one for one in typing.get_args(hint) if one is not type(None)]
    kind = options[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    return typing.get_origin(kind) or kind


def get_config() -> ConfigDict:
    """Connector and language model learn to answer, the tower is frozen, as in LLaVA-1.5."""
    config = ConfigDict({"seed": 0, "release": placeholder(str), "dtype": placeholder(str)})
    config.param_dtype = placeholder(str)  # of frozen parts
    config.update({"token_budget": placeholder(int), "token_budget_per": "image"})
    config.data = section(Conversations, train_path=None, num_images=None)
    config.data.kind, config.data.held_out = "conversations", placeholder(int)
    config.processor = section(ReleaseProcessorSettings)
    config.row = section(RowSettings, pack=True)
    config.encoder, config.decoder = (ConfigDict({"remat": placeholder(str)}) for _ in range(2))
    config.reducer, config.connector = ConfigDict({"kind": "none"}), ConfigDict({"kind": placeholder(str)})
    rates = {part: placeholder(float) for part in (*PARTS, LORA)}  # adapters where config.lora has a rank, else parts
    stage = section(Stage, objective="next_token", stream="questions", steps=None, batch_size=None, warmup_steps=None)
    stage.update(section(NextToken))
    stage.learning_rates, stage.accumulate = ConfigDict(rates), placeholder(int)
    config.stages, config.schedule = ConfigDict({"instruction": stage}), ("instruction",)
    config.optimizer = section(OptimizerSettings, b2=0.999, weight_decay=0.0)
    config.loop = section(LoopSettings)
    config.evaluation = section(EvaluationSettings, batch_size=None, question_length=None, max_new_tokens=64)
    config.lora = section(LoraSettings)
    config.mesh = section(MeshSettings, data=1, fsdp=-1)
    return config
