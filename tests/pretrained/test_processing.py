"""Processors of golden folders: they agree with their models, and disagreement is told."""

import dataclasses

import pytest

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.agreement import check_agreement, num_learned_rows
from vlm_jax.pretrained.processing.llava import canvases


@pytest.mark.parametrize(
    ("name", "learned"), [("deepseek_vl2_tiny", 2), ("ovis2", 5), ("ovis2_5", 4), ("ovis2_5_window", 4)]
)
def test_a_folder_and_its_model_agree(name, learned):
    model = vlm_jax.from_pretrained(DATA / name)
    assert model.processor.num_learned == learned
    assert num_learned_rows(model.module) in (None, learned)
    assert model.count_visual_tokens([(64, 64)]) == [len(model.processor.views.layouts([(64, 64)])[0])]
    wrong = dataclasses.replace(model.processor, num_learned=learned + 1)
    if num_learned_rows(model.module) is not None:
        with pytest.raises(PretrainedError, match=f"lays out {learned + 1} learned rows, the model has {learned}"):
            check_agreement(wrong, model.module)


def test_other_tokens_of_a_tile_are_told():
    model = vlm_jax.from_pretrained(DATA / "deepseek_vl2_tiny")
    views = dataclasses.replace(model.processor.views, tokens_per_side=3)
    with pytest.raises(PretrainedError, match=r"a tile of 48x48 pixels takes 9 places .* makes 4 tokens"):
        check_agreement(dataclasses.replace(model.processor, views=views), model.module)


def test_other_patches_are_told():
    model = vlm_jax.from_pretrained(DATA / "ovis2_5")
    views = model.processor.views
    views = dataclasses.replace(views, format=dataclasses.replace(views.format, patch_size=4))
    with pytest.raises(PretrainedError, match="the processor cuts patches as PatchFormat"):
        check_agreement(dataclasses.replace(model.processor, views=views), model.module)


def test_a_tower_alone_has_no_processor():
    with pytest.raises(
        PretrainedError, match=r"no processor is registered for 'siglip_vision_model'; registered: deep"
    ):
        _ = vlm_jax.from_pretrained(DATA / "s2_siglip").processor


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        ([[336, 672], [672, 336]], ((672, 336), (336, 672))),
        ("[[336, 672], [672, 336]]", ((672, 336), (336, 672))),
        ("(1x1),...,(2x2)", ((10, 10), (20, 10), (10, 20), (20, 20))),
    ],
)
def test_canvases_in_every_form(pinpoints, expected):
    assert canvases(pinpoints, 10, "llava") == expected
    with pytest.raises(PretrainedError, match=r"llava\.image_grid_pinpoints: expected pairs of pixels, got '1x1'"):
        canvases("1x1", 10, "llava")
