r"""SigLIP from scratch on pages of digits and their captions, the digits in reading order.

python -m vlm_jax.cli.train --config=configs/siglip_digits.py --workdir=run
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Two small towers for 2x2 pages; `smoke` shrinks the stage to a few steps."""
    config = base.get_config()
    config.token_budget = placeholder(int)
    config.data.update({"rows": 2, "cols": 2, "page_size": 24, "min_digit": 10, "variants": 24, "evaluation_size": 100})
    config.processor = ConfigDict(
        {
            "image_size": (24, 24),
            "mean": (0.15,),
            "std": (0.3,),
            "filter": "bilinear",
            "tokenizer": "digits",
            "special_tokens": {},
        }
    )
    config.row = ConfigDict({"text_length": 5})  # four digits and the end
    config.encoder = ConfigDict(
        {
            "kind": "vit",
            "patch_size": 12,
            "width": 96,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 192,
            "position": "learned",
            "pooling": "map",
            "projection_dim": placeholder(int),
        }
    )
    config.connector = ConfigDict({"kind": "similarity", "scale": 10.0, "bias": -5.0})
    config.decoder = ConfigDict(
        {
            "kind": "text_tower",
            "width": 96,
            "depth": 1,
            "num_heads": 4,
            "mlp_dim": 192,
            "causal": False,
            "pooling": "map",
            "projection_dim": placeholder(int),
        }
    )
    config.stages = ConfigDict(
        {
            "pairs": {
                "objective": "contrastive",
                "stream": "captions",
                "loss": "sigmoid",
                "exchange": "ring",
                "block_size": 512,
                "teacher": placeholder(str),
                "distillation_weight": 1.0,
                "max_scale": placeholder(float),
                "steps": 1000,
                "batch_size": 64,
                "accumulate": 1,
                "warmup_steps": 50,
                "learning_rates": {"image": 3e-3, "text": 3e-3, "log_scale": 1e-2, "bias": 1e-2},
            }
        }
    )
    config.schedule = ("pairs",)
    config.evaluation = ConfigDict(
        {"batch_size": 100, "ks": (1, 5, 10), "class_names": (), "templates": ("{}",), "every": placeholder(int)}
    )
    if arg == "smoke":
        config.stages.pairs.update({"steps": 4, "warmup_steps": 1, "batch_size": 8})
        config.data.evaluation_size = 8
        config.evaluation.batch_size = 8
    elif arg:
        raise ValueError(f"this config takes smoke, not '{arg}'")
    return config.lock()
