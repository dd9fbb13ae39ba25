"""DeepSeek-VL's configs: sizes by name, layer selection, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.pretrained import deepseek_vl
from vlm_jax.pretrained.family import PretrainedError

HIGH = {
    "model_name": "sam_b_downsample",
    "image_size": 1024,
    "select_feature": "same",
    "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
    "pixel_std": [0.26862954, 0.26130258, 0.27577711],
}
LOW = {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_layer": -1}
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


ALIGNER = {"projector_type": "low_high_hybrid_split_mlp_gelu", "input_dim": 1024, "n_embed": 4096, "depth": 2}


def described(cls, aligner=ALIGNER, **params):
    config = {
        "vision_config": {"cls": cls, "params": params},
        "aligner_config": {"cls": "MlpProjector", "params": aligner},
    }
    return deepseek_vl.describe(config, {}, **DTYPES)


def count(description):
    shapes = jax.eval_shape(description.module.init, jax.random.key(0), *description.inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_7b_model_has_sam_b_and_siglip_large_on_one_grid():
    description = described("HybridVisionTower", high_res_cfg=HIGH, low_res_cfg=LOW, concat_type="tuple")
    module = description.module.encoder
    assert module.high.grid(1024, 1024) == module.low.grid(384, 384) == (24, 24)
    assert module.high.features == module.low.features == 1024
    # SAM-B, a second neck, two convolutions and the scale; SigLIP-L without its head.
    neck, convolutions = 768 * 256 + 256 * 256 * 9 + 4 * 256, 9 * (256 * 512 + 512 * 1024)
    sam = 89_670_912 + neck + convolutions + 1
    siglip = 1024 * (16 * 16 * 3 + 1 + 576 + 2) + 24 * (12 * 1024**2 + 13 * 1024)
    halves, last = 2 * (1024 * 2048 + 2048), 4096 * 4096 + 4096
    assert count(description) == sam + siglip + halves + last


@pytest.mark.parametrize(("select_layer", "depth"), [(-1, 24), (-2, 23), (0, 24), (5, 5), (30, 24)])
def test_a_layer_is_selected_by_leaving_out_those_behind_it(select_layer, depth):
    module = described("CLIPVisionTower", **{**LOW, "select_layer": select_layer}).module.encoder
    assert module.depth == depth and module.final_norm == "tokens" and module.activation == "gelu"


@pytest.mark.parametrize(
    ("aligner", "message"),
    [
        ({"projector_type": "mlp_gelu", "input_dim": 8}, "aligner_config.params: expected the key n_embed"),
        ({**ALIGNER, "projector_type": "identity"}, "projector_type: expected 'linear' or .*, got 'identity'"),
    ],
)
def test_another_projector_is_refused(aligner, message):
    with pytest.raises(PretrainedError, match=message):
        described("CLIPVisionTower", aligner, **LOW)


@pytest.mark.parametrize(
    ("cls", "params", "message"),
    [
        ("VisionTower", LOW, "vision_config.cls: expected 'CLIPVisionTower' or"),
        ("CLIPVisionTower", {"image_size": 384}, "expected the key model_name"),
        (
            "CLIPVisionTower",
            {**LOW, "model_name": "siglip_large"},
            "unknown 'siglip_large'.*patch16",
        ),
        ("CLIPVisionTower", {**LOW, "pixel_mean": [0.5]}, r"params.pixel_mean: expected None, got \[0.5\]"),
        (
            "CLIPVisionTower",
            {**HIGH, "select_feature": "patch", "pixel_mean": None, "pixel_std": None},
            "'same'",
        ),
        ("HybridVisionTower", {"high_res_cfg": HIGH}, "expected the key low_res_cfg"),
        (
            "HybridVisionTower",
            {"high_res_cfg": HIGH, "low_res_cfg": LOW, "concat_type": "mean"},
            "concat_type: expected 'feature' or 'sequence'",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(cls, params, message):
    with pytest.raises(PretrainedError, match=message):
        described(cls, **params)


def test_the_siglip_width_of_the_so400m_models_is_truncated():
    module = described("CLIPVisionTower", **{**LOW, "model_name": "siglip_so400m_patch14_384"}).module.encoder
    assert module.mlp_dim == int(np.floor(1152 * 3.7362)) == 4304
