"""The table of chips against figures that follow from one another, and the choice of a row."""

import pytest

from vlm_jax.costs.chips import CHIPS, chip_of, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H200", 989.4e12), ("cpu", None)],
)
def test_peaks_are_those_of_the_longest_name(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.kind)
def test_a_device_kind_finds_its_own_row(chip):
    assert chip_of(chip.kind) is chip


@pytest.mark.parametrize(("kind", "units"), [("TPU v4", 8), ("TPU v5 lite", 4), ("TPU v5", 8)])
def test_a_peak_is_what_the_matrix_units_do_at_the_clock(kind, units):
    """Jouppi et al. 2023, table 4: units of 128 x 128 multiply-adds a cycle."""
    chip = chip_of(kind)
    assert units * 2 * 128**2 * chip.clock == pytest.approx(chip.flops, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "gigabytes"), [("TPU v5 lite", 400), ("TPU v5", 1200), ("TPU v6", 800), ("NVIDIA H100", 900)]
)
def test_links_add_up_to_the_published_bandwidth_in_both_directions(kind, gigabytes):
    chip = chip_of(kind)
    assert 2 * max(1, 2 * chip.dims) * chip.link_bandwidth == gigabytes * 1e9
