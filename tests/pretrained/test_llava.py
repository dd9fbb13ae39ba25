"""LLaVA's configs: its tower by name, the selected layer, several scales, and errors."""

import jax.numpy as jnp
import pytest

from vlm_jax.pretrained import llava
from vlm_jax.pretrained.family import PretrainedError

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
LLAVA = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
}


def test_llava_selects_a_layer_and_says_which_tensors_it_leaves_out():
    description = llava.describe(LLAVA, {}, **DTYPES)
    module, connector = description.module.encoder, description.module.connector
    assert connector.features == 4096 and connector.num_tokens(module.grid(336, 336)) == 576
    assert module.num_blocks == 23 and module.grid(336, 336) == (24, 24) and not module.keep_class_token
    left = [pattern for pattern in description.ignore if "encoder" in pattern]
    assert len(left) == 1 and r"layers\.23\." in left[0]
    whole = llava.describe(
        {**LLAVA, "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}, {}, **DTYPES
    )
    assert whole.module.encoder.num_blocks == 24 and whole.module.encoder.keep_class_token
    assert not any("encoder" in pattern for pattern in whole.ignore)


def test_llava_at_several_scales_splits_by_the_smallest():
    module = llava.describe({**LLAVA, "s2": True, "s2_scales": "1008,336,672"}, {}, **DTYPES).module.encoder
    assert module.image_sizes == ((336, 336), (672, 672), (1008, 1008)) and module.max_split_size == 336
    assert module.splits(1008, 1008) == ((1, 1), (2, 2), (3, 3)) and module.grid(1008, 1008) == (24, 24)
    assert module.features == 3 * 1024


@pytest.mark.parametrize(("kind", "tokens"), [("linear", 576), ("mlp3x_gelu", 576), ("ldpnet", 144), ("ldpnetv2", 144)])
def test_a_projector_has_the_tokens_of_its_kind(kind, tokens):
    module = llava.describe({**LLAVA, "model_type": "mobilevlm", "mm_projector_type": kind}, {}, **DTYPES).module
    assert module.connector.num_tokens(module.encoder.grid(336, 336)) == tokens and module.connector.features == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-335"}, "mm_vision_tower: unknown .*patch14-336"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: expected 'patch' or 'cls_patch'"),
        ({"mm_projector_type": "cabstractor"}, "mm_projector_type: expected one of linear, .*got 'cabstractor'"),
        ({"s2": True, "s2_scales": "336;672"}, "s2_scales: expected sides in pixels"),
    ],
)
def test_what_llava_cannot_be_is_refused(change, message):
    with pytest.raises(PretrainedError, match=message):
        llava.describe({**LLAVA, **change}, {}, **DTYPES)
