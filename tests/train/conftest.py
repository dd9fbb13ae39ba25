"""A run small enough to be taken many times: 2x2 pages of 24 pixels, one block on either side."""

import pytest
from ml_collections import ConfigDict

from configs import base, digits_stages


def tiny_config() -> ConfigDict:
    """Two stages of a few steps: dense pre-training, then answers with the encoder frozen."""
    config = base.get_config()
    config.token_budget = 4
    # Scans of one size in one variant: rendering them is what opening the data costs.
    config.data.update(
        {"rows": 2, "cols": 2, "page_size": 24, "min_digit": 8, "max_digit": 8, "variants": 1, "evaluation_size": 3}
    )
    config.processor.update({"image_size": (24, 24)})
    config.encoder.update({"patch_size": 6, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32})
    config.decoder.update({"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 32})
    config.encoder.remat = config.decoder.remat = "none"  # tracing takes half of the time
    config.connector = ConfigDict({"kind": "pool"})
    stages = digits_stages.pretraining()
    config.stages = ConfigDict(
        {"seeing": stages.encoder_pretraining.to_dict(), "answering": digits_stages.instruction().to_dict()}
    )
    config.schedule = ("seeing", "answering")
    for label, steps in (("seeing", 4), ("answering", 8)):
        config.stages[label].update({"steps": steps, "batch_size": 8, "warmup_steps": 2})
    config.loop.update({"save_every": 5, "log_every": 1})
    return config.lock()


@pytest.fixture
def config() -> ConfigDict:
    return tiny_config()
