"""Rotary positions against multiplication of complex numbers, and every scaling against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.rope import (
    Rope,
    prompt_growth,
    rope_angles,
    rotate,
    sequence_lengths,
    yarn_magnitude,
)

from ..advice import tried

THETA, DIM = 100.0, 16
PLAIN = THETA ** (-2 * np.arange(DIM // 2) / DIM)  # radians a position
POSITIONS = np.array([[0, 1, 7, 40]])


def angles_of(lengths=None, positions=POSITIONS, **settings):
    return np.asarray(Rope(THETA, **settings).angles(jnp.asarray(positions), DIM, lengths))


def per_position(angles):
    """Radians a position, after a check that angles grow with positions in proportion."""
    np.testing.assert_allclose(angles, POSITIONS[..., None] * angles[:, 1:2], rtol=2e-6)
    return angles[0, 1]


@pytest.mark.parametrize(("head_dim", "theta"), [(8, 10_000.0), (6, 100.0), (2, 10.0)])
def test_rotation_is_multiplication_of_complex_numbers(reference, head_dim, theta):
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, head_dim)).astype(np.float32), rng.integers(0, 50, size=(2, 5))
    angles = rope_angles(jnp.asarray(positions), head_dim, theta)
    expected = reference.rotate(x, positions, theta)
    np.testing.assert_allclose(rotate(jnp.asarray(x), angles), expected, atol=1e-5)
    np.testing.assert_allclose(rotate(jnp.asarray(x), angles, 1.5), 1.5 * expected, atol=1e-5)


def test_products_depend_on_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def turned(x, position):
        return np.asarray(rotate(x, rope_angles(jnp.array([[position]]), 16, 1e4)))

    products = [(turned(q, i) * turned(k, j)).sum() for i, j in ((3, 1), (10, 8), (102, 100), (1, 3))]
    np.testing.assert_allclose(products[:3], products[0], atol=1e-5)
    assert abs(products[3] - products[0]) > 1e-2


def test_angles_are_float32_and_the_dtype_of_the_input_stays():
    angles = rope_angles(jnp.array([[40_001]]), 4, 100.0)
    np.testing.assert_array_equal(angles, np.float32([[[40_001, 4_000.1]]]))
    assert rotate(jnp.ones((1, 1, 2, 4), jnp.bfloat16), angles).dtype == jnp.bfloat16


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(per_position(angles_of(scaling="linear", factor=2.5)), PLAIN / 2.5, rtol=1e-6)


def test_dynamic_scaling_follows_the_length_of_each_sequence():
    lengths = jnp.array([[3, 8, 9, 24]])
    got = angles_of(lengths, scaling="dynamic", factor=2.0, original_length=8)
    for place, length in enumerate([8, 8, 9, 24]):  # up to 8 as in training
        theta = THETA * (2.0 * length / 8 - 1.0) ** (DIM / (DIM - 2))
        expected = POSITIONS[0, place] * theta ** (-2 * np.arange(DIM // 2) / DIM)
        np.testing.assert_allclose(got[0, place], expected, rtol=3e-6)


def test_scaling_by_the_prompt_grows_in_powers_of_two():
    lengths = np.arange(1, 200)
    expected = [max(2 ** math.ceil(math.log2(length / 24) + 1) - 1, 1) for length in lengths]
    np.testing.assert_array_equal(prompt_growth(jnp.asarray(lengths), 24), expected)
    np.testing.assert_array_equal(prompt_growth(jnp.array([2048, 2049, 32_768, 32_769]), 2048), [1, 3, 31, 63])
    got = angles_of(jnp.array([[24, 25, 48, 49]]), scaling="dynamic_prompt", original_length=24)
    for place, growth in enumerate((1, 3, 3, 7)):
        theta = THETA * growth ** (DIM / (DIM - 2))
        expected = POSITIONS[0, place] * theta ** (-2 * np.arange(DIM // 2) / DIM)
        np.testing.assert_allclose(got[0, place], expected, rtol=3e-6)


def test_llama3_stretches_long_waves_alone():
    low, high, original, factor = 1.0, 4.0, 64, 8.0
    expected = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    settings = {"low_frequency_factor": low, "high_frequency_factor": high}
    got = per_position(angles_of(scaling="llama3", factor=factor, original_length=original, **settings))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    kept = np.isclose(got, PLAIN)
    assert kept[0] and not kept[-1] and len(set(np.round(got / PLAIN, 4))) > 2  # there is one in between


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_stretches_between_two_coordinates(truncate):
    fast, slow, original, factor = 8.0, 0.5, 64, 4.0

    def coordinate(turns):  # the one whose wave turns so often in the original length
        return DIM / 2 * math.log(original / (2 * math.pi * turns)) / math.log(THETA)

    low, high = coordinate(fast), coordinate(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    share = [min(max((i - max(low, 0)) / (min(high, DIM - 1) - max(low, 0)), 0), 1) for i in range(DIM // 2)]
    expected = [(1 - s) * frequency + s * frequency / factor for s, frequency in zip(share, PLAIN, strict=True)]
    settings = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    got = per_position(angles_of(scaling="yarn", factor=factor, original_length=original, **settings))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert 0 < sum(share) < len(share) - 1


def test_longrope_has_factors_for_short_and_for_long_sequences():
    short, long = np.linspace(1, 2, DIM // 2), np.linspace(2, 9, DIM // 2)
    settings = {"short_factors": tuple(short), "long_factors": tuple(long)}
    got = angles_of(jnp.array([[8, 8, 8, 9]]), scaling="longrope", factor=4.0, original_length=8, **settings)
    np.testing.assert_allclose(got[0, 2], POSITIONS[0, 2] * PLAIN / short, rtol=1e-5)
    np.testing.assert_allclose(got[0, 3], POSITIONS[0, 3] * PLAIN / long, rtol=1e-5)


def test_magnitudes():
    yarn = {"scaling": "yarn", "original_length": 8}
    assert Rope().magnitude == Rope(scaling="linear", factor=4.0).magnitude == 1.0
    assert Rope(factor=4.0, **yarn).magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert Rope(factor=4.0, attention_factor=0.7, **yarn).magnitude == 0.7
    assert yarn_magnitude(40.0, 0.707) == pytest.approx(0.0707 * math.log(40) + 1)
    assert yarn_magnitude(0.5) == 1.0
    long = {"scaling": "longrope", "original_length": 8, "short_factors": (1.0,), "long_factors": (2.0,)}
    assert Rope(factor=4.0, **long).magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(8)))
    assert Rope(factor=1.0, **long).magnitude == 1.0


def test_sections_follow_the_temporal_position_the_row_and_the_column_in_turn():
    positions = np.array([[[3, 5, 11], [4, 0, 2]]])
    got = angles_of(positions=positions, sections=(2, 3, 1, 2))
    axis = [0, 0, 1, 1, 1, 2, 0, 0]
    np.testing.assert_allclose(got, positions[..., axis] * PLAIN, rtol=1e-6)
    of_text = angles_of(sections=(2, 3, 1, 2))
    np.testing.assert_array_equal(of_text, angles_of())


def test_interleaved_axes_take_every_third_wavelength():
    """Up to three times the sections of row and column; all others are of the temporal position."""
    positions = np.array([[[3, 5, 11], [4, 0, 2]]])
    got = angles_of(positions=positions, sections=(4, 2, 2), interleaved=True)
    np.testing.assert_allclose(got, positions[..., [0, 1, 2, 0, 1, 2, 0, 0]] * PLAIN, rtol=1e-6)
    with pytest.raises(ValueError, match="three sections are needed for interleaved axes"):
        Rope(THETA, sections=(4, 4), interleaved=True)


def test_a_sequence_is_as_long_as_its_last_position_says():
    segments = jnp.array([[0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]])
    positions = jnp.array([[90, 0, 1, 0, 1, 2], [90, 90, 90, 7, 8, 5]])
    expected = [[91, 2, 2, 3, 3, 3], [91, 91, 91, 9, 9, 9]]
    np.testing.assert_array_equal(sequence_lengths(positions, segments), expected)
    axes = jnp.stack([positions - 1, positions, positions - 2], axis=-1)
    np.testing.assert_array_equal(sequence_lengths(axes, segments), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 2.0}, "rotary scaling none: factor is not read"),
        ({"scaling": "dynamic", "factor": 2.0}, "rotary scaling dynamic: original_length is needed"),
        ({"scaling": "linear", "beta_slow": 2.0, "truncate": False}, "beta_slow is not read, truncate is not read"),
        ({"scaling": "longrope", "original_length": 4}, "short_factors is needed, long_factors is needed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rope(**settings)


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="longrope: expected 8 factors, one for each angle, got 8 for short sequences"):
        Rope(THETA, "longrope", original_length=4, short_factors=(1.0,) * 8, long_factors=(1.0,)).check(DIM)
    with pytest.raises(ValueError, match=r"sections \(2, 2\) are for 4 angles, not 8"):
        angles_of(sections=(2, 2))
    with pytest.raises(
        ValueError, match=tried("positions have three axes, but a Rope without sections takes one; set sections")
    ):
        angles_of(positions=np.zeros((1, 2, 3), np.int32))
    assert angles_of(positions=np.zeros((1, 2, 3), np.int32), sections=(2, 3, 3)) is not None
