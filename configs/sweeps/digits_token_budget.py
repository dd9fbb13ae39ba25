"""How many visual tokens does reading a page of digits need, and with which connector?"""

from ml_collections import ConfigDict

from configs import base, digits_stages


def get_config(arg: str = "") -> ConfigDict:
    """Connectors and two controls at 1 to 16 tokens.

    Args:
      arg: "" for the sweep; `small` for average pooling to 1 and 16 tokens after a shorter
        pre-training, in a few minutes; `smoke` for a few steps of two points.
    """
    config = ConfigDict()
    config.base = base.get_config()
    config.base.stages = digits_stages.pretraining()
    config.base.stages.instruction = digits_stages.instruction()
    config.base.schedule = ("encoder_pretraining", "decoder_pretraining", "instruction")

    config.candidates = ConfigDict(
        {
            "mlp": {"budgets": (16,), "connector": {"kind": "mlp"}},
            "pool": {"budgets": (1, 2, 4, 8), "connector": {"kind": "pool"}},
            "pixel_shuffle": {"budgets": (1, 4), "connector": {"kind": "pixel_shuffle"}},
            "resampler": {"budgets": (1, 4, 16), "connector": {"kind": "resampler", "num_heads": 4}},
            "random": {"budgets": (1, 4, 8), "reducer": {"kind": "random"}},
            "downsample_image": {"budgets": (1, 4), "reducer": {"kind": "downsample_image"}},
        }
    )
    config.sweep = ConfigDict(
        {
            "shared": ("encoder_pretraining", "decoder_pretraining"),
            "seeds": (0,),
            "controls": ("random", "downsample_image"),
        }
    )
    if arg == "small":
        config.base.stages.encoder_pretraining.steps = 500
        config.base.stages.decoder_pretraining.steps = 200
        config.base.stages.instruction.steps = 150
        config.base.data.evaluation_size = 100
        config.candidates = ConfigDict({"pool": {"budgets": (1, 16), "connector": {"kind": "pool"}}})
        config.sweep.controls = ()
    elif arg == "smoke":
        digits_stages.shrink(config.base.stages)
        config.base.data.evaluation_size = 4
        config.base.evaluation.batch_size = 16
        config.candidates = ConfigDict(
            {name: {**config.candidates[name].to_dict(), "budgets": (8,)} for name in ("pool", "random")}
        )
        config.sweep.controls = ("random",)
    elif arg:
        raise ValueError(f"this config takes small or smoke, not '{arg}'")
    return config.lock()
