"""Options of the decoder, from a config."""

import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.layers.rope import Rope


def built(**decoder):
    config = base.get_config()
    config.decoder = ConfigDict({**config.decoder.to_dict(), **decoder})
    return build(config)


def test_heads_windows_and_scaled_positions():
    rope = {"theta": 500.0, "scaling": "yarn", "factor": 4.0, "original_length": 32, "sections": (2, 4, 6)}
    experiment = built(rope=rope, windows=(None, 8, None), qk_norm=True, qkv_bias=True, head_dim=24, log_length=64)
    decoder = experiment.system.model.decoder
    assert decoder.rope == Rope(500.0, "yarn", factor=4.0, original_length=32, sections=(2, 4, 6))
    assert decoder.windows == (None, 8, None) and decoder.log_length == 64
    attention = experiment.boxed_shapes()["decoder"]["blocks"]["layers"]["attention"]
    assert attention["query"]["bias"].value.shape == (3, 96) and attention["key_norm"]["scale"].value.shape == (3, 24)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"scaling": "ntk"}, r"config\.decoder\.rope\.scaling: expected one of 'none', 'linear'"),
        ({"base": 100.0}, r"config\.decoder\.rope\.base: unknown or unused key"),
        ({"scaling": "llama3", "factor": 8.0}, r"config\.decoder\.rope: .* original_length is needed"),
    ],
)
def test_rotary_settings_that_do_not_fit_are_named(rope, message):
    with pytest.raises(ConfigError, match=message):
        built(rope=rope)
