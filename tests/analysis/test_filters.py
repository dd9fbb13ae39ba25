"""Filter components against sklearn's decompositions."""

import numpy as np
import pytest
from sklearn.decomposition import PCA, TruncatedSVD

from vlm_jax.analysis.filters import draw_filters, filter_components

# Directions of different strength, so that components are well apart, and a mean that is not 0.
_RNG = np.random.default_rng(0)
_STRENGTHS = np.linspace(3, 0.1, 27)
KERNEL = (_STRENGTHS[:, None] * _RNG.normal(size=(27, 40)) + 0.5).reshape(3, 3, 3, 40).astype(np.float32)
FILTERS = KERNEL.reshape(27, 40).T.astype(np.float64)


def with_positive_peak(components):
    peaks = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    return components * np.sign(peaks)


def test_centred_components_are_those_of_pca():
    found, pca = filter_components(KERNEL, 6), PCA(6, svd_solver="full").fit(FILTERS)
    assert found.components.shape == (6, 3, 3, 3)
    expected = with_positive_peak(pca.components_)
    np.testing.assert_allclose(found.components.reshape(6, 27), expected, atol=1e-5)
    np.testing.assert_allclose(found.singular_values, pca.singular_values_, rtol=1e-5)
    np.testing.assert_allclose(found.explained_variance, pca.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(found.explained_share, pca.explained_variance_ratio_, rtol=1e-5)


def test_uncentred_components_are_those_of_the_plain_decomposition():
    found = filter_components(KERNEL, 4, centred=False)
    svd = TruncatedSVD(4, algorithm="arpack").fit(FILTERS)
    expected = with_positive_peak(svd.components_)
    np.testing.assert_allclose(found.components.reshape(4, 27), expected, atol=1e-5)
    np.testing.assert_allclose(found.singular_values, svd.singular_values_, rtol=1e-5)
    squares = svd.singular_values_**2
    np.testing.assert_allclose(found.explained_variance, squares / 40, rtol=1e-5)
    np.testing.assert_allclose(found.explained_share, squares / np.square(FILTERS).sum(), rtol=1e-5)


def test_all_components_explain_everything_and_are_orthonormal():
    found = filter_components(KERNEL, 27)
    assert found.explained_share.sum() == pytest.approx(1, abs=1e-6)
    flat = found.components.reshape(27, 27)
    np.testing.assert_allclose(flat @ flat.T, np.eye(27), atol=1e-6)


@pytest.mark.parametrize("count", [0, 28])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=f"1 to 27 components of 40 filters with 27 entries, got {count}"):
        filter_components(KERNEL, count)


@pytest.mark.parametrize(("channels", "shape"), [(3, (3, 3, 3)), (1, (3, 3)), (2, (3, 3))])
def test_the_figure_shows_every_component_with_grey_for_0(channels, shape):
    found = filter_components(KERNEL[:, :, :channels], 8)
    figure = draw_filters(found)
    assert len(figure.axes) == 8
    for axes, component, share in zip(figure.axes, found.components, found.explained_share, strict=True):
        picture = np.asarray(axes.images[0].get_array())
        assert picture.shape == shape
        drawn = component if channels == 3 else component.mean(-1)
        peak = np.abs(drawn).max()
        np.testing.assert_allclose((picture - 0.5) * 2 * peak, drawn, atol=1e-6)
        assert np.abs(picture - 0.5).max() == pytest.approx(0.5)
        assert axes.get_title() == f"{share:.1%}"
