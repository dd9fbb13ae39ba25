"""Reports of releases: a classifier's tower, two towers, a vision-language model, and what is not analysed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import vlm_jax
from tests.contracts import releases
from tests.golden.conftest import DATA
from tests.reducers import definitions
from vlm_jax.analysis.attention_distance import mean_attention_distance
from vlm_jax.analysis.kept import Kept, draw_kept, reduced_features
from vlm_jax.analysis.probe import attention_weights
from vlm_jax.analysis.release import analyse_release
from vlm_jax.analysis.report import write_report
from vlm_jax.config import ConfigError
from vlm_jax.encoders.vit import ViT
from vlm_jax.system import UnsupportedError

PICTURES = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)) for seed in (0, 1)]


def at_even_steps(count, budget):
    return np.arange(budget) * count // budget


def test_the_tokens_of_a_vision_language_model(tmp_path):
    """An MLP makes each token of one feature, and DivPrune is what its paper says, on a quarter of the 16 tokens."""
    model = releases.make("llava", tmp_path)
    found = analyse_release(model, PICTURES, reducers=["uniform_stride", "divprune"])
    np.testing.assert_allclose(found.token_maps, np.eye(16), atol=1e-6)
    views = model.processor.views
    images = jnp.concatenate([one.pixels for one in views.images(PICTURES)])
    encoder, params = model.module.encoder, model.params["encoder"]
    weights = attention_weights(encoder, params, images)
    expected = mean_attention_distance(weights, (4, 4), 4, renormalise=True)
    np.testing.assert_allclose(found.attention_distance_renormalised, expected, atol=1e-4)
    features = np.asarray(encoder.apply({"params": params}, images[:1]).tokens[0])
    even, diverse = found.kept
    assert even.grid == diverse.grid == (4, 4) and (even.reducer, diverse.reducer) == ("uniform_stride", "divprune")
    np.testing.assert_array_equal(even.index, at_even_steps(16, 4))
    np.testing.assert_array_equal(diverse.index, sorted(definitions.divprune(features, 4)))
    with np.load(write_report(found, tmp_path / "report").parent / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["kept_divprune"], diverse.index)
    assert (tmp_path / "report" / "kept.png").exists()


@pytest.mark.parametrize(("name", "part"), [("vit_jax_token", "encoder"), ("open_clip_vit", "image")])
def test_towers_without_a_connector(name, part):
    model = vlm_jax.from_pretrained(DATA / name)
    found = analyse_release(model, PICTURES[:1], reducers=["uniform_stride"], token_budget=3)
    images = jnp.asarray(model.processor(images=PICTURES[:1]).images)
    weights = attention_weights(getattr(model.module, part), model.params[part], images)
    expected = mean_attention_distance(weights, found.grid, found.patch_size, renormalise=False)
    np.testing.assert_allclose(found.attention_distance, expected, atol=1e-4)
    np.testing.assert_array_equal(found.kept[0].index, at_even_steps(np.prod(found.grid), 3))
    assert found.token_maps is None and found.num_prefix == 1


def test_registers_are_not_among_what_is_kept():
    fields = {"image_size": (12, 20), "patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8}
    vit = ViT(**fields, class_token=True, num_registers=3)
    images = jax.random.normal(jax.random.key(0), (2, 12, 20, 3))
    params = vit.init(jax.random.key(1), images)["params"]
    plain = vit.apply({"params": nn.meta.unbox(params)}, images)
    found = reduced_features(vit, params, images, "fastervlm", 5)
    index = np.asarray(found.kept)
    np.testing.assert_allclose(found.tokens, np.take_along_axis(plain.tokens, index[..., None], 1), atol=1e-5)
    received = np.asarray(attention_weights(vit, params, images))[-1].mean(1)[:, 0, 4:]  # of the class token
    np.testing.assert_array_equal(index, np.sort(np.argsort(-received, axis=1)[:, :5]))


def test_what_is_not_kept_is_pale():
    figure = draw_kept(np.zeros((8, 12, 3), np.uint8), [Kept("random", np.array([0, 5]), (2, 3))])
    (axes,) = figure.axes
    alpha = axes.images[1].get_array()[..., 3]
    np.testing.assert_array_equal(alpha > 0, [[False, True, True], [True, True, False]])


def test_packed_towers_and_reducers_that_choose_nothing_are_refused(tmp_path):
    for name in ("qwen2_vl", "llava"):
        (tmp_path / name).mkdir()
    with pytest.raises(UnsupportedError, match="QwenViT is not analysed: expected a tower of images of one size"):
        analyse_release(releases.make("qwen2_vl", tmp_path / "qwen2_vl"), PICTURES)
    model = releases.make("llava", tmp_path / "llava")
    with pytest.raises(ConfigError, match="reducer: no kind 'fastv'"):
        analyse_release(model, PICTURES, reducers=["fastv"])
