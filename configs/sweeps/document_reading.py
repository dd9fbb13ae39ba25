"""How many characters of a printed page does one visual token hold?

The axis of DeepSeek-OCR (arXiv 2510.18234, section 4.1): precision against text tokens per visual token, here
characters, from scratch at a small size. One line of the page is asked for, any of them, so that the visual tokens have
to hold them all.
"""

from ml_collections import ConfigDict

from configs import base, digits_stages

PAGE = 64  # pixels, with 8x8 patches
GRIDS = ((4, 4), (4, 8), (8, 8))  # 16, 32 and 64 characters, each of 4, 2 or 1 patches
SHARED = ("encoder_pretraining", "decoder_pretraining", "alignment", "instruction")
# Adaptation of a connector of its own to the system that the shared stages trained with all 64 tokens.
ADAPTED, LONGER = {"schedule": ("adaptation",)}, {"schedule": ("long_adaptation",)}


def get_config(arg: str = "") -> ConfigDict:
    """Connectors and two controls at 1 to 64 tokens, on pages of 16, 32 and 64 characters.

    Args:
      arg: "" for the sweep; `small` for 16 characters and two points; `smoke` for a few steps of two points.
    """
    config = ConfigDict()
    config.base = model()
    config.base.stages = stages()
    config.base.schedule = SHARED

    matryoshka = {"kind": "matryoshka", "budgets": (1, 4, 16, 64), "inner": {"kind": "pool"}}
    resampler = {"kind": "resampler", "num_heads": 4}
    config.candidates = ConfigDict(
        {
            "mlp": {"budgets": (64,)},
            "matryoshka_pool": {"budgets": (1, 4, 16, 64), "trained_at": 64, "connector": matryoshka, **LONGER},
            "pixel_shuffle": {"budgets": (4, 16), "connector": {"kind": "pixel_shuffle"}, **ADAPTED},
            "resampler": {"budgets": (4, 16), "connector": resampler, **LONGER},
            "random": {"budgets": (4, 16), "reducer": {"kind": "random"}},
            "downsample_image": {
                "budgets": (4, 16),
                "connector": {"kind": "mlp"},
                "reducer": {"kind": "downsample_image"},
                **ADAPTED,
            },
        }
    )
    config.sweep = ConfigDict({"shared": SHARED, "seeds": (0,), "controls": ("random", "downsample_image")})
    if arg == "small":
        config.base.data.grids = GRIDS[:1]
        config.base.row.text_length = 73
        config.candidates = ConfigDict({name: config.candidates[name] for name in ("mlp", "pixel_shuffle")})
        config.candidates.pixel_shuffle.budgets = (16,)
        config.sweep.controls = ()
    elif arg == "smoke":
        digits_stages.shrink(config.base.stages)
        config.base.data.update({"evaluation_size": 2, "grids": GRIDS[:1], "context_grids": ((4, 4),)})
        config.base.evaluation.update({"batch_size": 4, "max_new_tokens": 5})
        config.candidates = ConfigDict(
            {name: {**config.candidates[name].to_dict(), "budgets": (16,)} for name in ("pixel_shuffle", "random")}
        )
        config.sweep.controls = ("random",)
    elif arg:
        raise ValueError(f"this config takes small or smoke, not '{arg}'")
    return config.lock()


def model() -> ConfigDict:
    """The base with pages of text: 64 patches, and as many tokens at full budget."""
    config = base.get_config()
    config.token_budget = 64
    config.data = ConfigDict(
        {
            "kind": "documents",
            "grids": GRIDS,
            "page_size": PAGE,
            "context_grids": ((8, 8), (4, 8), (4, 4)),
            "task_weights": {"ocr_line": 1.0},
            "turns_per_page": 6,
            "evaluation_size": 128,
        }
    )
    config.processor.update({"image_size": (PAGE, PAGE), "tokenizer": "documents"})
    config.row.text_length = (
        97  # a start token, and six times `READ LINE 8 OF 8 BY 8` with 8 characters and an end token
    )
    config.encoder.update({"patch_size": 8, "width": 64, "depth": 2, "mlp_dim": 192, "remat": "none"})
    config.decoder.update({"width": 64, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 192, "remat": "none"})
    config.decoder.rope.theta = 500.0  # sequences have at most 161 positions
    config.evaluation.update({"batch_size": 128, "question_length": 8, "max_new_tokens": 9})
    return config


def stages() -> ConfigDict:
    """Encoder and decoder by themselves, a connector between them, then connector and decoder together."""
    shared = {"batch_size": 16, "accumulate": 1, "warmup_steps": 30}
    encoder = {**shared, "objective": "read_cells", "stream": "cells", "steps": 2000}
    encoder["box_weight"] = 0.15  # with DETR's 5 the boxes keep a small encoder from learning the classes
    text = {**shared, "objective": "next_token", "stream": "text_pages", "steps": 2000}
    found = {
        "encoder_pretraining": encoder | {"learning_rates": {"encoder": 5e-3, "cell_head": 5e-3}},
        "decoder_pretraining": text | {"learning_rates": {"decoder": 4e-3}},
    }
    for name, steps, learning_rates in (
        ("alignment", 150, {"connector": 6e-3}),
        ("instruction", 600, {"connector": 2e-3, "decoder": 2e-3}),
        ("adaptation", 800, {"connector": 6e-3, "decoder": 2e-3}),
        ("long_adaptation", 1000, {"connector": 6e-3, "decoder": 2e-3}),
    ):
        found[name] = text | {"stream": "questions", "steps": steps, "learning_rates": learning_rates}
    return ConfigDict(found)
