"""An encoder that gives several hidden states, and a connector that reads them, from a config."""

import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.build import build

VIT = {"kind": "vit", "patch_size": 12, "width": 8, "depth": 3, "num_heads": 2, "mlp_dim": 8, "class_token": True}


def shapes(**encoder):
    config = base.get_config()
    config.encoder = ConfigDict({**VIT, **encoder})
    config.connector = ConfigDict({"kind": "token_packer"})
    config.token_budget = 4
    experiment = build(config)
    return experiment.boxed_shapes()


@pytest.mark.parametrize(("levels", "width"), [((), 8), ((1, -2), 16), ((0, 1, 2), 24)])
def test_keys_are_made_of_all_levels(levels, width):
    params = shapes(levels=levels, select_layer=-2)
    for part in ("key_mlp", "value_mlp"):
        assert params["connector"][part]["up"]["kernel"].value.shape == (width, 8)
    assert params["encoder"]["blocks"]["layers"]["mlp"]["up"]["kernel"].value.shape[0] == 2


@pytest.mark.parametrize("level", [3, -1, 4, -5])
def test_a_level_that_is_not_built_is_refused(level):
    with pytest.raises(
        ValueError, match=rf"levels \[{level}\]: 2 of 3 blocks are built, with the hidden states 0 to 2"
    ):
        shapes(levels=(1, level), select_layer=-2)
