"""Sections of a config that no system can be built from."""

import pytest

from vlm_jax.build.settings import ProcessorSettings, RowSettings
from vlm_jax.config import ConfigError

SETTINGS = {
    "image_size": (8, 8),
    "mean": (0.0,),
    "std": (1 / 255,),
    "filter": "box",
    "tokenizer": "digits",
    "independent_turns": False,
}


@pytest.mark.parametrize(
    ("change", "channels", "message"),
    [
        ({}, 2, r"config\.data\.channels: .* got 2"),
        ({"mean": (0.5, 0.5)}, 1, r"config\.processor\.mean: expected 1 numbers, one per channel, got \(0\.5, 0\.5\)"),
        ({}, 3, r"config\.processor\.mean: expected 3 numbers, one per channel, got"),
        ({"std": (0.0,)}, 1, r"config\.processor\.std\[0\]: expected above 0, got 0\.0"),
        (
            {"filter": "nearest"},
            1,
            r"config\.processor\.filter: expected one of box, bilinear, bicubic, lanczos, got 'nearest'",
        ),
    ],
)
def test_impossible_pixels_are_refused(change, channels, message):
    with pytest.raises(ConfigError, match=message):
        ProcessorSettings(**{**SETTINGS, **change}).pixels(channels)


@pytest.mark.parametrize("fields", [{}, {"text_length": 8, "length": 12}])
def test_a_row_has_one_length(fields):
    with pytest.raises(ConfigError, match=r"config\.row: expected either text_length .* or length"):
        RowSettings(**fields)


def test_positions_of_a_row():
    """Visual tokens are added to those of text, and counted in the length of all."""
    assert RowSettings(text_length=8).positions(5) == 13
    assert RowSettings(length=12).positions(5) == 12
