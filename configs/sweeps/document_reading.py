"""How many characters of a printed page does one visual token hold?

The axis of DeepSeek-OCR (arXiv 2510.18234, section 4.1): precision against text tokens per visual token, here
characters, from scratch at a small size.
"""

from ml_collections import ConfigDict

from configs import base, digits_stages

PAGE = 96  # pixels, with 12x12 patches
GRIDS = ((6, 6), (6, 12), (12, 12))  # 36, 72 and 144 characters, each of 4, 2 or 1 patches


def get_config(arg: str = "") -> ConfigDict:
    """Connectors and two controls at 4 to 144 tokens, on pages of 36, 72 and 144 characters.

    Args:
      arg: "" for the sweep; `small` for 36 characters and two points; `smoke` for a few steps of two points.
    """
    config = ConfigDict()
    config.base = model()
    config.base.stages = stages()
    config.base.schedule = ("encoder_pretraining", "decoder_pretraining", "alignment", "instruction")

    # A connector of its own is aligned first; without one a candidate begins with the mlp of the shared stages.
    own = {"schedule": ("alignment", "instruction")}
    matryoshka = {"kind": "matryoshka", "budgets": (4, 36, 144), "inner": {"kind": "pool"}}
    config.candidates = ConfigDict(
        {
            "mlp": {"budgets": (144,)},
            "matryoshka_pool": {"budgets": (4, 36, 144), "trained_at": 144, "connector": matryoshka, **own},
            "pixel_shuffle": {"budgets": (4, 16, 36), "connector": {"kind": "pixel_shuffle"}, **own},
            "resampler": {"budgets": (4, 16, 36), "connector": {"kind": "resampler", "num_heads": 4}, **own},
            "random": {"budgets": (4, 16, 36), "reducer": {"kind": "random"}},
            "downsample_image": {"budgets": (4, 16, 36), "reducer": {"kind": "downsample_image"}},
        }
    )
    config.sweep = ConfigDict(
        {
            "shared": ("encoder_pretraining", "decoder_pretraining", "alignment"),
            "seeds": (0,),
            "controls": ("random", "downsample_image"),
        }
    )
    if arg == "small":
        config.base.data.grids, config.base.data.context_grids = GRIDS[:1], ((12, 12),)
        config.base.row.text_length = 96
        config.candidates = ConfigDict({name: config.candidates[name] for name in ("mlp", "pixel_shuffle")})
        config.candidates.pixel_shuffle.budgets = (16,)
        config.sweep.controls = ()
    elif arg == "smoke":
        digits_stages.shrink(config.base.stages)
        config.base.data.update({"evaluation_size": 2, "grids": GRIDS[:1], "context_grids": ((6, 6),)})
        config.base.evaluation.update({"batch_size": 4, "max_new_tokens": 38})
        config.candidates = ConfigDict(
            {name: {**config.candidates[name].to_dict(), "budgets": (16,)} for name in ("pixel_shuffle", "random")}
        )
        config.sweep.controls = ("random",)
    elif arg:
        raise ValueError(f"this config takes small or smoke, not '{arg}'")
    return config.lock()


def model() -> ConfigDict:
    """The base with pages of text: 144 patches, and as many tokens at full budget."""
    config = base.get_config()
    config.token_budget = 144
    config.data = ConfigDict(
        {
            "kind": "documents",
            "grids": GRIDS,
            "page_size": PAGE,
            "context_grids": ((12, 12), (6, 12), (6, 6)),
            "task_weights": {"ocr": 1.0, "ocr_line": 1.0},
            "turns_per_page": 2,
            "evaluation_size": 64,
        }
    )
    config.processor.update({"image_size": (PAGE, PAGE), "tokenizer": "documents"})
    # `READ 12 BY 12` with 144 characters and `READ LINE 12 OF 12 BY 12` with 12, a start token and two end tokens.
    config.row.text_length = 176
    config.encoder.update({"patch_size": 8, "width": 64, "depth": 2, "mlp_dim": 192, "remat": "none"})
    config.decoder.update({"width": 64, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 192, "remat": "none"})
    config.decoder.rope.theta = 1000.0  # sequences have at most 320 positions
    config.evaluation.update({"batch_size": 64, "question_length": 11, "max_new_tokens": 146})
    return config


def stages() -> ConfigDict:
    """Encoder and decoder by themselves, a connector between them, then connector and decoder together."""
    shared = {"steps": 150, "batch_size": 16, "accumulate": 1, "warmup_steps": 20}
    questions = {"objective": "next_token", "stream": "questions"}
    return ConfigDict(
        {
            "encoder_pretraining": {
                **shared,
                "objective": "read_cells",
                "stream": "cells",
                "steps": 2000,
                "box_weight": 0.15,  # with DETR's 5 the boxes keep a small encoder from learning the classes
                "learning_rates": {"encoder": 5e-3, "cell_head": 5e-3},
            },
            "decoder_pretraining": {
                **shared,
                "objective": "next_token",
                "stream": "text_pages",
                "steps": 1300,
                "learning_rates": {"decoder": 3e-3},
            },
            "alignment": {**shared, **questions, "learning_rates": {"connector": 6e-3}},
            "instruction": {**shared, **questions, "learning_rates": {"connector": 2e-3, "decoder": 1e-3}},
        }
    )
