"""Encoders that are composed of encoders, from a config."""

import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.multiscale import MultiScale

from .advice import tried

VIT = {"kind": "vit", "patch_size": 12, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
SAM = {**VIT, "kind": "sam", "neck_dim": 8, "global_blocks": (0,)}


def built(encoder, budget, connector=None):
    config = base.get_config()
    config.encoder = ConfigDict(encoder)
    if connector is not None:
        config.connector = ConfigDict(connector)
    config.token_budget = budget
    return build(config)


def test_several_scales():
    experiment = built({"kind": "multiscale", "encoder": VIT, "scales": (1, 2)}, budget=16)
    encoder = experiment.system.model.encoder
    assert isinstance(encoder, MultiScale) and encoder.encoder.image_size == (48, 48)
    assert experiment.system.budget.grid == (4, 4) and encoder.features == 16
    params = experiment.boxed_shapes()
    assert params["encoder"]["encoder"]["positions"]["table"].value.shape == (16, 8)


def test_a_part_may_have_an_image_size_of_its_own():
    low = {**VIT, "patch_size": 6, "image_size": (24, 24)}
    section = {"kind": "hybrid", "high": SAM, "low": low, "low_size": 24, "combine": "feature"}
    encoder = built(section, budget=16).system.model.encoder
    assert isinstance(encoder, Hybrid) and encoder.features == 16
    assert encoder.high.image_size == (48, 48) and encoder.low.image_size == (24, 24)


def test_the_second_encoder_of_a_cascade_has_a_table_of_the_first_ones_features():
    """48 pixels in patches of 12, halved once: 2 x 2 features."""
    behind = {**VIT, "patch_size": 1, "embeds_patches": False}
    section = {"kind": "cascade", "first": {**SAM, "downsample_dims": (8,)}, "second": behind}
    experiment = built(section, budget=4)
    assert experiment.system.budget.grid == (2, 2)
    assert experiment.boxed_shapes()["encoder"]["second"]["positions"]["table"].value.shape == (4, 8)
    own = built({**section, "second": {**behind, "image_size": (3, 3)}}, budget=4)
    assert own.boxed_shapes()["encoder"]["second"]["positions"]["table"].value.shape == (9, 8)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"kind": "multiscale", "scales": (1,)},
            "config.encoder.encoder: expected the section of an encoder",
        ),
        (
            {"kind": "multiscale", "scales": (1,), "encoder": 3},
            "config.encoder.encoder: expected a section, with keys, got 3",
        ),
        (
            {"kind": "multiscale", "scales": (1,), "encoder": {"kind": "vot"}},
            "config.encoder.encoder.kind.*'vit'",
        ),
        ({"kind": "multiscal", "scales": (1,), "encoder": VIT}, "did you mean 'multiscale'"),
        ({"kind": "multiscale", "scale": (1,), "encoder": VIT}, "config.encoder.scale: unknown"),
        (
            {"kind": "multiscale", "scales": (1,), "encoder": {**VIT, "image_size": 48}},
            "config.encoder.encoder.image_size: expected",
        ),
        (
            {"kind": "hybrid", "high": SAM, "low": VIT, "low_size": 24, "combine": "mean"},
            "config.encoder.combine: expected one of",
        ),
    ],
)
def test_a_wrong_section_is_named(section, message):
    with pytest.raises(ConfigError, match=message):
        built(section, budget=16)


def test_two_feature_maps_are_joined():
    low = {**VIT, "patch_size": 6}
    section = {"kind": "hybrid", "high": SAM, "low": low, "low_size": 24, "combine": "tuple"}
    told = tried("'tuple' returns two feature maps; use 'feature', which joins them, with hybrid_mlp")
    with pytest.raises(ConfigError, match=told):
        built(section, budget=16)
    shapes = built({**section, "combine": "feature"}, budget=16, connector={"kind": "hybrid_mlp"}).boxed_shapes()
    halves = [shapes["connector"][name]["kernel"].value.shape for name in ("high", "low")]
    assert halves == [(8, base.get_config().decoder.width // 2)] * 2
