"""A run small enough to be taken many times: 2x2 pages of 24 pixels, one block on either side."""

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, digits_stages
from vlm_jax.sharding.mesh import MeshSettings, make_mesh


def tiny_config() -> ConfigDict:
    """Two stages of a few steps: dense pre-training, then answers with the encoder frozen."""
    config = base.get_config()
    config.token_budget = 4
    config.data.update(
        {"rows": 2, "cols": 2, "page_size": 24, "variants": 2, "evaluation_size": 3, "text_scales": (1,)}
    )
    config.processor.update({"image_size": (24, 24)})
    config.encoder.update({"patch_size": 6, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32})
    config.decoder.update({"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 32})
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


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(MeshSettings(data=1), jax.devices()[:1])
