"""Settings of MiniCPM-V 4.6 that are refused, and what its config decides."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import describe_known, known_config
from vlm_jax.pretrained.token_counts import count_tokens

from ..contracts.releases import FOLDERS

NAME = "openbmb/MiniCPM-V-4.6"


def described(**changes):
    case = FOLDERS["minicpmv4_6"]
    tensors = {key: np.zeros(shape, np.float32) for key, shape in case.names.items()}
    config = {**case.config, **changes}
    return FAMILIES["minicpmv4_6"](config, tensors, dtype=jnp.float32, param_dtype=jnp.float32).module


def vision(**changes):
    return {"vision_config": {**FOLDERS["minicpmv4_6"].config["vision_config"], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_mode": "8x"}, "minicpmv4_6.downsample_mode: expected '16x' or '4x', got '8x'"),
        ({"merger_times": 2}, "minicpmv4_6.merger_times: expected 1, got 2"),
        ({"merge_kernel_size": [4, 4]}, r"minicpmv4_6.merge_kernel_size: expected \[2, 2\], got \[4, 4\]"),
        (vision(window_kernel_size=[1, 4]), r"vision_config.window_kernel_size: expected \[2, 2\], got \[1, 4\]"),
        ({"insert_layer_id": 3}, "insert_layer_id: expected a layer from 0 to 2, got 3"),
        ({"insert_layer_id": -1}, "insert_layer_id: expected a layer from 0 to 2, got -1"),
        ({"text_config": None}, "minicpmv4_6: expected the key text_config, not found"),
        ({"vision_config": 3}, "minicpmv4_6.vision_config: expected an object, got 3"),
        (vision(hidden_act="mish"), "vision_config.hidden_act: expected"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(PretrainedError, match=message):
        described(**changes)


def test_the_merger_is_where_the_config_says():
    """The number beside the sections takes precedence; the last block may be before the merger."""
    assert described(**vision(insert_layer_id=0)).encoder.merge_after == 2
    assert described(insert_layer_id=2).encoder.merge_after == 3


def test_both_modes_have_the_same_parameters():
    coarse, fine = described(), described(downsample_mode="4x")
    assert coarse.encoder.merges and not fine.encoder.merges
    assert coarse.encoder == dataclasses.replace(fine.encoder, merges=True, parent=coarse.encoder.parent)
    assert (coarse.encoder.patch_format.merge_size, fine.encoder.patch_format.merge_size) == (4, 2)


def test_the_release():
    encoder = describe_known(NAME).module.encoder
    assert (encoder.merge_after, encoder.table_side, encoder.grid(448, 448)) == (7, 70, (16, 16))
    assert encoder.merges and "downsample_mode" not in known_config(NAME)  # the class's own


def test_visual_tokens_of_the_release():
    """64 tokens for a view of 448 pixels and nine slices; 256 with the budget of the other mode."""
    sizes = [(448, 448), (1344, 1344), (448, 896)]
    assert count_tokens(NAME, sizes) == (64, 640, 66 + 2 * 64)
    assert count_tokens(NAME, sizes[:2], 2560) == (256, 2560)
    # Eight slices of 11x6 tokens and the whole are too many; six of 7x10 are left.
    assert count_tokens(NAME, sizes[:2], 576) == (64, 64 + 6 * 70)
    assert count_tokens(NAME, sizes[:2], 63) == (49, 49)
    assert count_tokens(NAME, sizes[:1], 0) == (None,)
