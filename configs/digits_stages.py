"""Stages for the pages of digits: train the encoder, train the decoder, then both together."""

from ml_collections import ConfigDict


def pretraining() -> ConfigDict:
    """The encoder with dense supervision, and the decoder on pages as text."""
    return ConfigDict(
        {
            "encoder_pretraining": {
                "objective": "read_cells",
                "stream": "cells",
                "steps": 900,
                "batch_size": 32,
                "accumulate": 1,
                "warmup_steps": 50,
                "learning_rates": {"encoder": 5e-3, "cell_head": 5e-3},
            },
            "decoder_pretraining": {
                "objective": "next_token",
                "stream": "text_pages",
                "steps": 500,
                "batch_size": 32,
                "accumulate": 1,
                "warmup_steps": 30,
                "learning_rates": {"decoder": 3e-3},
            },
        }
    )


def instruction() -> ConfigDict:
    """Connector and decoder learn to answer from pages; the encoder is frozen."""
    return ConfigDict(
        {
            "objective": "next_token",
            "stream": "questions",
            "steps": 300,
            "batch_size": 32,
            "accumulate": 1,
            "warmup_steps": 30,
            "learning_rates": {"connector": 2e-3, "decoder": 1e-3},
        }
    )


def three_stages() -> ConfigDict:
    """Qwen-VL's three stages (Bai et al. 2023, section 3), at the size of the pages of digits.

    First encoder and connector learn against a frozen decoder, then everything, then the encoder
    is frozen for instruction tuning.
    """
    alignment, multitask = instruction(), instruction()
    alignment.learning_rates = ConfigDict({"encoder": 1e-3, "connector": 2e-3})
    multitask.learning_rates = ConfigDict({"encoder": 5e-4, "connector": 1e-3, "decoder": 1e-3})
    return ConfigDict({"alignment": alignment, "multitask": multitask, "instruction": instruction()})


def shrink(stages: ConfigDict) -> None:
    """Reduces every stage to a few steps, in place, for a smoke run."""
    for label in stages:
        stages[label].steps, stages[label].warmup_steps, stages[label].batch_size = 4, 1, 8
