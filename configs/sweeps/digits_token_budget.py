"""How few visual tokens can a page of digits be read with, and through which connector?"""

from ml_collections import ConfigDict

from configs import base
from configs.presets import digits_stages


def get_config(arg: str = "") -> ConfigDict:
    """Connectors and two controls at 1 to 64 tokens; `smoke` shrinks every run to a few steps."""
    config = ConfigDict()
    config.base = base.get_config()
    config.base.stages = digits_stages.pretraining()
    config.base.stages.instruction = digits_stages.instruction()
    config.base.schedule = ("encoder_pretraining", "decoder_pretraining", "instruction")

    config.candidates = ConfigDict(
        {
            "mlp": {"budgets": (64,), "connector": {"kind": "mlp"}},
            "pool": {"budgets": (1, 4, 16), "connector": {"kind": "pool"}},
            "pixel_shuffle": {"budgets": (1, 4, 16), "connector": {"kind": "pixel_shuffle"}},
            "resampler": {"budgets": (1, 4, 16, 64), "connector": {"kind": "resampler", "num_heads": 4}},
            "random": {"budgets": (1, 4, 16), "reducer": {"kind": "random"}},
            "downsample_image": {"budgets": (1, 4, 16), "reducer": {"kind": "downsample_image"}},
        }
    )
    config.sweep = ConfigDict(
        {
            "shared": ("encoder_pretraining", "decoder_pretraining"),
            "seeds": (0,),
            "controls": ("random", "downsample_image"),
        }
    )
    if arg == "smoke":
        digits_stages.shrink(config.base.stages)
        config.base.data.evaluation_size = 4
        config.base.evaluation.batch_size = 16
        config.candidates = ConfigDict(
            {name: {**config.candidates[name].to_dict(), "budgets": (16,)} for name in ("pool", "random")}
        )
        config.sweep.controls = ("random",)
    return config.lock()
