"""The sections that every runnable config has, at sizes for pages of handwritten digits.

A runnable config calls `get_config()`, changes what differs and returns it locked. No value is
derived here: `vlm_jax/build.py` does that.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A small model for 4x4 pages of 48 pixels: 64 patches at full budget."""
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.param_dtype = "float32"
    # Visual tokens of one image that reach the decoder, whatever the connector.
    config.token_budget = 64

    config.data = ConfigDict({"kind": "digits"})
    config.processor = ConfigDict(
        {
            "image_size": (48, 48),
            "mean": (0.15,),
            "std": (0.3,),
            "filter": "bilinear",
            "tokenizer": "digits",
            "independent_turns": True,
            "max_text_length": 64,
            "max_question_length": 8,
            "max_answer_length": 24,
        }
    )
    config.encoder = ConfigDict(
        {"kind": "vit", "patch_size": 6, "width": 96, "depth": 3, "num_heads": 4, "mlp_dim": 384}
    )
    config.reducer = ConfigDict({"kind": "none"})
    config.connector = ConfigDict({"kind": "mlp"})
    config.decoder = ConfigDict(
        {"kind": "transformer", "width": 96, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 256}
    )

    # Stages in the order that they are run in; each is described under `stages`.
    config.schedule = ()
    config.stages = ConfigDict()
    config.optimizer = ConfigDict()
    config.loop = ConfigDict()
    config.evaluation = ConfigDict({"batch_size": 128})
    config.mesh = ConfigDict()
    return config
