"""How many visual tokens does reading a page of digits need, and through which connector or reducer?"""

from ml_collections import ConfigDict

from configs import base, digits_stages

SHARED = ("encoder_pretraining", "decoder_pretraining", "fine_pretraining", "alignment", "instruction")
# Adaptation of a connector of its own to the system that the shared stages trained with all 64 tokens.
ADAPTED = {"schedule": ("adaptation",)}
NESTED = (1, 2, 4, 8, 16, 64)
MATRYOSHKA = {"kind": "matryoshka", "budgets": NESTED, "inner": {"kind": "pool"}}


def get_config(arg: str = "") -> ConfigDict:
    """One system with 64 tokens; connectors adapted to fewer, reducers without training, and two controls.

    Args:
      arg: "" for two seeds; `full` for five, and more budgets; `small` for all tokens and average pooling to 1 and 16
        after a shorter training, in a few minutes; `smoke` for a few steps of two points.
    """
    config = ConfigDict()
    config.base = base.get_config()
    digits_stages.set_sizes(config.base)
    stages = digits_stages.pretraining()
    stages.update({"alignment": digits_stages.alignment(), "instruction": digits_stages.instruction()})
    for label, steps in (("adaptation", 250), ("long_adaptation", 500), ("resampler_adaptation", 600)):
        stages[label] = digits_stages.adaptation(steps)
    stages["resampler_alignment"] = digits_stages.alignment(800)
    config.base.stages = stages
    config.base.schedule = SHARED

    config.candidates = ConfigDict(
        {
            "mlp": {"budgets": (64,)},
            "visionzip": {"budgets": (4, 16), "reducer": {"kind": "visionzip"}},
            # Of three layers. With the default, two, some seeds have read the digit before the drop and some have not.
            "fastv": {"budgets": (4, 16), "reducer": {"kind": "fastv", "layer": 1}},
            "random": {"budgets": (4, 16), "reducer": {"kind": "random"}},
            "pool": {"budgets": (4, 16), "connector": {"kind": "pool"}, **ADAPTED},
            "pixel_shuffle": {"budgets": (16,), "connector": {"kind": "pixel_shuffle"}, **ADAPTED},
            "resampler": {
                "budgets": (16,),
                "connector": {"kind": "resampler", "num_heads": 4},
                "schedule": ("resampler_alignment", "resampler_adaptation"),
            },
            "matryoshka": {
                "budgets": NESTED,
                "trained_at": 64,
                "connector": MATRYOSHKA,
                "schedule": ("long_adaptation",),
            },
            "downsample_image": {
                "budgets": (16,),
                "connector": {"kind": "mlp"},
                "reducer": {"kind": "downsample_image"},
                **ADAPTED,
            },
        }
    )
    config.sweep = ConfigDict({"shared": SHARED, "seeds": (0, 1), "controls": ("random", "downsample_image")})
    if arg == "full":
        config.sweep.seeds = (0, 1, 2, 3, 4)
        for name in ("visionzip", "fastv", "random"):
            config.candidates[name].budgets = (1, 4, 16, 32)
        config.candidates.pyramid_drop = ConfigDict({"budgets": (16, 32), "reducer": {"kind": "pyramid_drop"}})
        for name in ("pool", "downsample_image"):
            config.candidates[name].budgets = (1, 4, 16)
        config.candidates.pixel_shuffle.budgets = (4, 16)
        config.candidates.resampler.budgets = (4, 16)
    elif arg == "small":
        shorter = {"encoder_pretraining": 400, "decoder_pretraining": 300, "fine_pretraining": 350, "instruction": 150}
        for label, steps in shorter.items():
            config.base.stages[label].steps = steps
        config.base.data.evaluation_size = 100
        pool = {"budgets": (1, 16), "connector": {"kind": "pool"}, **ADAPTED}
        config.candidates = ConfigDict({"mlp": {"budgets": (64,)}, "pool": pool})
        config.sweep.seeds, config.sweep.controls = (0,), ()
    elif arg == "smoke":
        digits_stages.shrink(config.base.stages)
        config.base.data.evaluation_size = 4
        config.base.evaluation.batch_size = 16
        config.candidates = ConfigDict(
            {name: {**config.candidates[name].to_dict(), "budgets": (16,)} for name in ("pool", "random")}
        )
        config.sweep.seeds, config.sweep.controls = (0,), ("random",)
    elif arg:
        raise ValueError(f"this config takes full, small or smoke, not '{arg}'")
    return config.lock()
