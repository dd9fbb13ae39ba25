"""Two towers of one block, for 2x2 pages of 24 pixels and their captions."""

from ml_collections import ConfigDict

from configs import siglip_digits

RATES = {"image": 2e-3, "text": 2e-3, "log_scale": 1e-2, "bias": 1e-2}


def tiny_towers(**stages: dict) -> ConfigDict:
    """A config with the given stages, each of which changes the one of `siglip_digits`."""
    config = siglip_digits.get_config().unlock()
    config.data.update({"min_digit": 8, "max_digit": 8, "variants": 1, "evaluation_size": 6})
    config.encoder.update({"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16, "projection_dim": 12})
    config.connector.bias, config.optimizer.epsilon = -10.0, 1e-2  # no update from the rounding of a gradient of 0
    config.decoder.update({"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16, "projection_dim": 12})
    config.loop.update({"save_every": 100, "log_every": 1})
    config.evaluation.batch_size = 4
    stage = {**config.stages.pairs.to_dict(), "steps": 2, "batch_size": 8, "warmup_steps": 0}
    config.stages = ConfigDict({label: {**stage, **changes} for label, changes in stages.items()})
    config.schedule = tuple(stages)
    return config.lock()
