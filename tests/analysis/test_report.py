"""The report: its arrays against those of each analysis, its files, and what it says."""

import base64
import io
import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from tests.analysis.toys import RotaryEncoder
from vlm_jax.analysis.attention_distance import mean_attention_distance
from vlm_jax.analysis.filters import filter_components
from vlm_jax.analysis.position_similarity import position_similarity
from vlm_jax.analysis.probe import attention_weights
from vlm_jax.analysis.report import analyse, figures, write_report
from vlm_jax.analysis.token_maps import connection, token_maps
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pool import Pool
from vlm_jax.encoders.vit import ViT

IMAGES = jax.random.normal(jax.random.key(1), (3, 12, 20, 3))


def vit(**changes):
    fields = {"image_size": (12, 20), "patch_size": 4, "width": 16, "depth": 2, "num_heads": 4, "mlp_dim": 8}
    module = ViT(**fields | {"class_token": True} | changes)
    return module, module.init(jax.random.key(0), IMAGES)["params"]


def rotary():
    module = RotaryEncoder()
    return module, module.init(jax.random.key(0), IMAGES)["params"]


def test_the_arrays_are_those_of_each_analysis(tmp_path):
    module, params = vit()
    features = module.apply({"params": params}, IMAGES)
    pool = Pool(features=6, output_grid=(1, 2))
    connect = connection(pool, pool.init(jax.random.key(2), features, deterministic=True)["params"])
    analysis = analyse(module, params, IMAGES, num_components=5, batch_size=2, connect=connect)
    assert (analysis.grid, analysis.patch_size, analysis.num_prefix) == ((3, 5), 4, 1)
    path = write_report(analysis, tmp_path / "new" / "report")

    weights = attention_weights(module, params, IMAGES)
    filters = filter_components(nn.meta.unbox(params)["patch_embed"]["kernel"], 5)
    expected = {
        "attention_distance": mean_attention_distance(weights, (3, 5), 4, renormalise=False),
        "attention_distance_renormalised": mean_attention_distance(weights, (3, 5), 4, renormalise=True),
        "position_similarity": position_similarity(nn.meta.unbox(params)["positions"]["table"].reshape(3, 5, 16)),
        **{f"filter_{name}": value for name, value in filters._asdict().items()},
        "token_maps": token_maps(connect, features)[0],
    }
    with np.load(path.parent / "arrays.npz") as arrays:
        assert set(arrays.files) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(arrays[name], array, atol=1e-5, err_msg=name)

    text = path.read_text()
    assert "ViT" in text and "Images: 3." in text and "Tokens before the patches: 1." in text
    for row in expected["attention_distance_renormalised"]:
        assert "".join(f"<td>{value:.1f}</td>" for value in (*row, row.mean())) in text


def test_the_page_needs_no_other_file_and_shows_the_figures_beside_it(tmp_path):
    analysis = analyse(*vit(), IMAGES)
    path = write_report(analysis, tmp_path)
    text = path.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    names = ["attention_distance", "attention_distance_plain", "position_similarity", "filters"]
    assert list(figures(analysis)) == re.findall(r'<figure id="(\w+)">', text) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"{name}.png" for name in names] + ["arrays.npz", "report.html"]
    )
    for name, source in zip(names, sources, strict=True):
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png == (tmp_path / f"{name}.png").read_bytes()
        assert min(Image.open(io.BytesIO(png)).size) > 100
    assert "http" not in text and "<script" not in text


def test_an_encoder_without_position_embeddings_or_class_token_says_so(tmp_path):
    analysis = analyse(*rotary(), IMAGES)
    assert analysis.similarity is None and "position_similarity" not in analysis.arrays()
    assert list(figures(analysis)) == ["attention_distance", "filters"]
    assert "adds no position embeddings" in write_report(analysis, tmp_path).read_text()
    np.testing.assert_allclose(analysis.attention_distance, analysis.attention_distance_renormalised, rtol=1e-6)
    assert len(analysis.filters.components) == 16  # of 28 asked for


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        analyse(*rotary(), IMAGES[:0])


def test_the_share_of_a_class_token_that_is_kept_is_not_drawn():
    module, params = vit(keep_class_token=True)
    features = module.apply({"params": params}, IMAGES)
    mlp = MlpConnector(features=6)
    connect = connection(mlp, mlp.init(jax.random.key(2), features, deterministic=True)["params"])
    analysis = analyse(module, params, IMAGES, connect=connect)
    np.testing.assert_allclose(analysis.token_maps, np.eye(16), atol=1e-6)
    drawn = figures(analysis)["token_maps"].axes[1].images[1].get_array()
    np.testing.assert_allclose(drawn, np.eye(15)[0].reshape(3, 5), atol=1e-6)
