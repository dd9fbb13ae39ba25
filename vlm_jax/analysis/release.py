"""The report of a released tower, or of a vision-language model's tower, on images."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from flax import linen as nn
from jaxtyping import Float

from vlm_jax.analysis.kept import Kept, kept_of_release, kept_of_tower
from vlm_jax.analysis.report import Analysis, analyse
from vlm_jax.analysis.token_maps import connection
from vlm_jax.encoders import ENCODERS
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.family import marker
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.conversation import Picture
from vlm_jax.processors.image import to_picture
from vlm_jax.system import UnsupportedError
from vlm_jax.types import Params


class Tower(NamedTuple):
    """An encoder with what it reads.

    Attributes:
      encoder: of images of one size.
      params: its parameters.
      images: normalised pixels; of an image with several tiles, the first.
    """

    encoder: nn.Module
    params: Params
    images: Float[np.ndarray, "B height width channels"]


def tower_of(model: Pretrained, pictures: Sequence[Picture]) -> Tower:
    """The image tower of a release, and the images as its processor prepares them.

    Raises:
      UnsupportedError: the release has no tower that reads images of one size.
      PretrainedError, CorruptImage: no processor, or an image that cannot be read.
    """
    module, params = model.module, model.params
    opened = [to_picture(one) for one in pictures]
    if isinstance(module, VLM) and module.encoder is not None:
        encoder = _of_one_size(module.encoder)
        images = [one.pixels[0] for one in model.processor.views.images(opened)]
        return Tower(encoder, params["encoder"], np.stack(images))
    images = getattr(model.processor, "images", None)
    if images is None:
        raise UnsupportedError(f"'{marker(model.config)}' reads no images: there is no tower to analyse")
    if isinstance(module, TwoTower):
        encoder, params = module.image, params["image"]
    elif isinstance(module, Classifier):
        encoder, params = module.encoder, params["encoder"]
    else:
        encoder = module
    return Tower(_of_one_size(encoder), params, np.asarray(model.processor(images=opened).images))


def _of_one_size(encoder: object) -> nn.Module:
    """The encoder, or an error unless it reads images of one size by itself."""
    if isinstance(encoder, tuple(ENCODERS.values())) and isinstance(encoder, nn.Module):
        return encoder
    expected = ", ".join(one.__name__ for one in ENCODERS.values())
    raise UnsupportedError(
        f"{type(encoder).__name__} is not analysed: expected a tower of images of one size ({expected})"
    )


def analyse_release(
    model: Pretrained,
    pictures: Sequence[Picture],
    *,
    reducers: Sequence[str] = (),
    token_budget: int | None = None,
    num_projections: int | None = 16,
    num_components: int = 28,
    batch_size: int = 1,
) -> Analysis:
    """Computes every array of a report: of the tower, of the connector, and of what reducers keep of the first image.

    Args:
      model: a tower, a two-tower model, a classifier, or a vision-language model of images of one size.
      pictures: at least one; attention distances are averaged over all.
      reducers: kinds of `kept.CHOOSING`; on a tower they act on its features, on a vision-language model as
        `config.reducer`.
      token_budget: features or tokens that these keep; a quarter when None.
      num_projections, num_components, batch_size: as in `analyse`; projections are at most the tokens' width.

    Raises:
      UnsupportedError: as `tower_of`, or an encoder that `probe` cannot read.
      ConfigError, InfeasibleBudget: a reducer that is unknown, or that the model does not allow.
    """
    tower, module = tower_of(model, pictures), model.module
    first, count = tower.images[:1], int(np.prod(tower.encoder.grid(*tower.images.shape[1:3])))
    connect = None
    if isinstance(module, VLM) and module.connector is not None:
        connect = connection(cast(nn.Module, module.connector), model.params.get("connector", {}))
        count = module.connector.num_tokens(tower.encoder.grid(*first.shape[1:3]))
        if num_projections is not None:
            num_projections = min(num_projections, module.connector.features)
    budget = max(1, count // 4) if token_budget is None else token_budget
    kept: list[Kept | None] = []
    for kind in reducers:
        if isinstance(module, VLM):
            kept.append(kept_of_release(model, first, kind, budget))
        else:
            kept.append(kept_of_tower(tower.encoder, tower.params, first, kind, budget))
    settings = {"num_components": num_components, "batch_size": batch_size, "num_projections": num_projections}
    try:
        return analyse(
            *tower, connect=connect, kept=tuple(one for one in kept if one is not None), **cast(dict, settings)
        )
    except ValueError as error:
        raise UnsupportedError(f"'{marker(model.config)}' cannot be analysed: {error}") from error
