"""Systems of included released configs, for planning: the model, and a processor of the same shapes without its files.

A row has the shapes of the released processor's; its texts are not those of the release, whose tokenizer and template
are not included.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.family import PretrainedError, text_section
from vlm_jax.pretrained.known import describe_known, known_config, known_folder
from vlm_jax.pretrained.processing import is_grouped, read_views
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.image_text import ImageTextProcessor, SquareInputs, TextInputs
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.plain_prompt import PlainPrompt
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.square import SquareViews
from vlm_jax.system import System
from vlm_jax.types import Config, Dtype, Tree

PIXELS = Pixels((0.5,) * 3, (0.5,) * 3)


def known_system(name: str, *, dtype: Dtype, param_dtype: Dtype) -> System:
    """The system of one of `known.known_configs`, without a checkpoint.

    Args:
      name: `organisation/name`.
      dtype: of the products.
      param_dtype: of the stored parameters.

    Raises:
      PretrainedError: no such config, or one of a tower or a language model alone.
    """
    described, config = describe_known(name, dtype=dtype, param_dtype=param_dtype), known_config(name)
    model = described.module
    no_ends = functools.partial(_same, ())
    if isinstance(model, VLM) and model.encoder is None:
        raise PretrainedError(f"{name}: has no encoder to plan with")
    if isinstance(model, VLM):
        processor = _conversations(name, model, config)
        return System(model, described.inputs, functools.partial(_same, processor), no_ends)
    if not isinstance(model, TwoTower | Classifier):
        raise PretrainedError(f"{name}: a {type(model).__name__} by itself is not trained; name a whole system")
    tower: Any = model.image if isinstance(model, TwoTower) else model.encoder
    assert isinstance(tower, ViT) and tower.image_size is not None, name
    views = SquareViews(PIXELS, tower.image_size)
    inputs: tuple[Tree, ...] = (jax.ShapeDtypeStruct((1, *views.size, 3), jnp.float32),)
    texts = None
    if isinstance(model, TwoTower):
        assert isinstance(model.text, TextTower)
        length = model.text.context_length
        texts = TextInputs(digits_tokenizer(), length, 0)
        inputs = (*inputs, jax.ShapeDtypeStruct((1, length), jnp.int32))
    pairs = ImageTextProcessor(SquareInputs(views), texts)
    return System(model, inputs, functools.partial(_same, pairs), no_ends)


def _conversations(name: str, model: VLM, config: Config) -> Processor:
    tokenizer = digits_tokenizer()
    sections = text_section(config).get("rope_scaling") or config.get("rope_scaling") or {}
    rotary_3d = "mrope_section" in sections
    views = read_views(known_folder(name), config, model)
    own = {"num_learned": model.num_learned_rows, "rotary_3d": rotary_3d, "grouped": is_grouped(config)}
    return Processor(PlainPrompt(tokenizer), views, tokenizer, 0, **own)


def _same(value: Any) -> Any:
    return value
