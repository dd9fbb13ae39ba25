"""The sections that every runnable config has, at sizes for pages of handwritten digits.

A runnable config calls `get_config()`, changes some values and returns it locked. Every key is documented
by the class that reads it: modules and settings classes used in `vlm_jax/build`. No value is derived here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """A small model for 4x4 pages of 48 pixels: 16 patches at full budget."""
    config = ConfigDict()
    config.seed = 0
    # A released folder, or its name on the hub, from which parts, processor and template are taken; None: the sections
    # below describe everything.
    config.release = placeholder(str)
    config.dtype = "float32"  # of activations
    # Of the parameters of frozen parts; those of a part that any stage trains are float32.
    config.param_dtype = "float32"
    # Visual tokens that reach the decoder, for any connector: of one image with all its tiles (or a
    # clip with all its frames), of each tile, or of each frame.
    config.token_budget = 16
    config.token_budget_per = "image"

    config.data = ConfigDict(
        {
            "kind": "digits",
            "rows": 4,
            "cols": 4,
            "page_size": 48,
            "min_digit": 8,
            "max_digit": 12,
            "task_weights": {"read": 2.0, "transcribe": 2.0, "count": 1.0, "locate": 1.0},
            "turns_per_page": 6,
            "turns_per_text_page": 6,
            "text_scale": 2,
            "coarse_share": 0.0,
            "evaluation_size": 400,
            "augment": True,
            "variants": 8,
            "intensity": 0.1,
            "noise": 2.0,
        }
    )
    config.processor = ConfigDict(
        {
            "image_size": (48, 48),
            "tiles": (1, 1),
            "thumbnail": False,
            "frames": placeholder(int),
            "min_tokens": 1,
            "mean": (0.15,),
            "std": (0.3,),
            "filter": "bilinear",
            "tokenizer": "digits",
            "special_tokens": {},
            "independent_turns": True,
        }
    )
    # Positions of a training row: text, and the visual tokens that the budget adds to it. With `pack` several samples
    # share a row of `length` positions and `images` tiles.
    config.row = ConfigDict(
        {
            "text_length": 64,
            "length": placeholder(int),
            "images": placeholder(int),
            "pictures": placeholder(int),
            "kept": placeholder(tuple),
            "pack": False,
            "buckets": 1,
            "turns": "all",
            "as_released": False,
        }
    )
    config.encoder = ConfigDict(
        {
            "kind": "vit",
            "patch_size": 12,
            "width": 96,
            "depth": 3,
            "num_heads": 4,
            "mlp_dim": 384,
            "position": "learned",
            "remat": "full",
        }
    )
    config.reducer = ConfigDict({"kind": "none"})
    config.connector = ConfigDict({"kind": "mlp"})
    config.decoder = ConfigDict(
        {
            "kind": "transformer",
            "width": 96,
            "depth": 3,
            "num_heads": 4,
            "num_kv_heads": 4,
            "mlp_dim": 256,
            "rope": {"theta": 100.0},  # sequences have at most 128 positions
            "tie_embeddings": False,
            "remat": "dots",
        }
    )

    # Adapters (LoRA), off without a rank; what learns is a stage's learning_rates, "lora" for all of them.
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0, "dropout": 0.0, "rslora": False, "target": ()})

    # Stages in the order in which they run; each is described under `stages`.
    config.schedule = ()
    config.stages = ConfigDict()
    config.optimizer = ConfigDict(
        {
            "b1": 0.9,
            "b2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "final_scale": 0.0,
            "first_moment": "float32",
            "second_moment": "float32",
            "ema": placeholder(float),
        }
    )
    config.loop = ConfigDict(
        {
            "save_every": 200,
            "keep": 2,
            "log_every": 20,
            "input_workers": 0,
            "writers": ("tensorboard",),
            "profile": placeholder(tuple),
            "peak_flops": placeholder(float),
            "on_nonfinite": "stop",
            "spike_loss": placeholder(float),
            "spike_grad_norm": placeholder(float),
            "max_skipped": 5,
        }
    )
    config.evaluation = ConfigDict(
        {"batch_size": 200, "question_length": 8, "max_new_tokens": 24, "every": placeholder(int), "metrics": ()}
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1})
    return config
