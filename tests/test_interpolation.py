"""Interpolation weights against closed forms; torch itself is met in tests/parity."""

from typing import get_args

import numpy as np
import pytest

from vlm_jax.interpolation import ResizeKind, fixed_point_weights, interpolation_weights

KINDS = get_args(ResizeKind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(5, 5), (7, 3), (3, 8), (4, 1), (1, 4)])
def test_a_constant_stays_constant(kind, sizes):
    weights = interpolation_weights(*sizes, kind)
    assert weights.shape == sizes[::-1]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("bilinear", (2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
        ("bilinear", (4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        # Without antialias every second pair is not read at all.
        ("bilinear", (8, 2), [[0, 0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.5, 0.5, 0]]),
        # The triangle of half-width 2, cut at the edge: 0.25, 0.75, 0.75, 0.25 less the first.
        ("bilinear_antialias", (4, 2), [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]]),
        ("area", (5, 2), [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]]),
        ("area", (2, 4), [[1, 0], [1, 0], [0, 1], [0, 1]]),
        ("corner_linear", (2, 4), [[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 1]]),
        ("corner_linear", (5, 3), [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]),
        # Half-way between samples Keys' kernel is a/8, 1/2 - a/8, 1/2 - a/8, a/8.
        ("bicubic", (4, 2), [[19 / 32 - 3 / 32, 19 / 32, -3 / 32, 0], [0, -3 / 32, 19 / 32, 0.5]]),
    ],
)
def test_weights_are_those_of_the_closed_form(kind, sizes, expected):
    np.testing.assert_allclose(interpolation_weights(*sizes, kind), expected, atol=1e-6)


def test_the_two_bicubic_kernels_differ_in_their_constant():
    middle = interpolation_weights(8, 16, "bicubic")[7], interpolation_weights(8, 16, "bicubic_antialias")[7]
    # At a distance of 1.25 the kernel is a * (5/4 - 1) * (2 - 5/4)**2 = 9/64 a.
    assert middle[0][2] == pytest.approx(-0.75 * 9 / 64) and middle[1][2] == pytest.approx(-0.5 * 9 / 64)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"), [((3, 0), "area", "3 samples to 0"), ((3, 2), "lanczos", "no inter")]
)
def test_what_cannot_be_resized_is_named(sizes, kind, message):
    with pytest.raises(Exception, match=message if kind in KINDS else "lanczos"):
        interpolation_weights(*sizes, kind)


def test_weights_in_fixed_point_are_the_closed_form_in_as_many_bits_as_fit():
    """3/7 and 1/7 times 2 ** 16, after which 3/7 would not fit into 15 bits and a sign."""
    weights, bits = fixed_point_weights(4, 2, "bilinear_antialias")
    assert (bits, weights.dtype) == (16, np.int32)
    np.testing.assert_array_equal(weights.toarray(), [[28087, 28087, 9362, 0], [0, 9362, 28087, 28087]])
    weights, bits = fixed_point_weights(1, 2, "bicubic_antialias")  # a weight of 1 has 14 bits after the point
    assert (bits, weights.toarray().tolist()) == (14, [[2**14], [2**14]])
