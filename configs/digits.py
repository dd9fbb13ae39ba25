"""One model for pages of digits, from scratch: pre-training, then Qwen-VL's three stages."""

from ml_collections import ConfigDict

from configs import base, digits_stages


def get_config(arg: str = "") -> ConfigDict:
    """Average pooling to 16 tokens; `smoke` shrinks every stage to a few steps."""
    config = base.get_config()
    digits_stages.set_sizes(config)
    config.token_budget = 16
    config.connector = ConfigDict({"kind": "pool"})
    config.stages = digits_stages.pretraining()
    config.stages.update(digits_stages.three_stages())
    config.schedule = (
        "encoder_pretraining",
        "decoder_pretraining",
        "fine_pretraining",
        "alignment",
        "multitask",
        "instruction",
    )
    if arg == "smoke":
        digits_stages.shrink(config.stages)
        config.data.evaluation_size = 4
        config.evaluation.batch_size = 16
    elif arg:
        raise ValueError(f"this config takes smoke, not '{arg}'")
    return config.lock()
