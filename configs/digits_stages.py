"""Sizes and stages for the pages of digits: train the encoder, then the decoder, align them, then train both."""

from ml_collections import ConfigDict


def _stage(stream: str, steps: int, learning_rates: dict[str, float], *, batch_size: int = 8) -> dict:
    return {
        "objective": "next_token",
        "stream": stream,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": 1,
        "warmup_steps": 30,
        "learning_rates": learning_rates,
    }


def set_sizes(config: ConfigDict) -> None:
    """Sets, in place, pages and a model with 64 patches, four in a cell, that learn all tasks in a few minutes."""
    config.token_budget = 64
    config.data.update(
        {"min_digit": 11, "variants": 16, "turns_per_page": 8, "turns_per_text_page": 12, "coarse_share": 0.5}
    )
    config.data.task_weights = ConfigDict({"read": 1.0, "transcribe": 1.0, "count": 2.0, "locate": 0.5})
    config.data.evaluation_size = 200
    config.row.text_length = 78  # also where every count is of two digits
    config.encoder.update({"patch_size": 6, "width": 64, "depth": 2, "mlp_dim": 192, "remat": "none"})
    config.decoder.update({"width": 64, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 128, "remat": "none"})
    config.loop.log_every = 100


def pretraining() -> ConfigDict:
    """The encoder with dense supervision, and the decoder on pages as text.

    Text comes first with a character for each cell, where what to look for is learned in a few hundred steps, and then
    with the four that a cell has as patches. Half of the pages keep one: a connector to 16 tokens then needs no more
    steps than it takes to learn what a token means.
    """
    encoder = _stage("cells", 900, {"encoder": 5e-3, "cell_head": 5e-3}, batch_size=32)
    # With the weight of DETR, 5, the boxes' gradient keeps the encoder from learning the classes.
    encoder |= {"objective": "read_cells", "box_weight": 0.15}
    return ConfigDict(
        {
            "encoder_pretraining": encoder,
            "decoder_pretraining": _stage("text_pages", 800, {"decoder": 4e-3}, batch_size=16),
            "fine_pretraining": _stage("fine_text_pages", 700, {"decoder": 2e-3}),
        }
    )


def alignment(steps: int = 150) -> ConfigDict:
    """The connector alone learns to give the decoder what it reads as text."""
    return ConfigDict(_stage("questions", steps, {"connector": 6e-3}))


def instruction() -> ConfigDict:
    """Connector and decoder learn to answer from pages; the encoder is frozen."""
    return ConfigDict(_stage("questions", 850, {"connector": 2e-3, "decoder": 2e-3}))


def adaptation(steps: int = 250) -> ConfigDict:
    """A new connector before a decoder that answers from pages already."""
    return ConfigDict(_stage("questions", steps, {"connector": 6e-3, "decoder": 2e-3}))


def three_stages() -> ConfigDict:
    """Qwen-VL's three stages (Bai et al. 2023, section 3), at the size of the pages of digits.

    First encoder and connector learn against a frozen decoder, then everything, then the encoder
    is frozen for instruction tuning.
    """
    first, multitask = instruction(), instruction()
    first.learning_rates = ConfigDict({"encoder": 1e-3, "connector": 2e-3})
    multitask.learning_rates = ConfigDict({"encoder": 5e-4, "connector": 1e-3, "decoder": 1e-3})
    return ConfigDict({"alignment": first, "multitask": multitask, "instruction": instruction()})


def shrink(stages: ConfigDict) -> None:
    """Reduces every stage to a few steps, in place, for a smoke run."""
    for label in stages:
        stages[label].steps, stages[label].warmup_steps, stages[label].batch_size = 4, 1, 8
