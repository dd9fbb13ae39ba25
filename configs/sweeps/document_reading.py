"""How many characters of a printed page does one visual token hold?

The axis of DeepSeek-OCR (arXiv 2510.18234, section 4.1): precision against text tokens per visual token, here
characters, from scratch at a small size.
"""

from ml_collections import ConfigDict

from configs import base

PAGE, PATCH = 96, 6  # pixels: 16x16 patches
GRIDS = ((4, 4), (8, 8), (8, 16))  # 16, 64 and 128 characters
BUDGETS = (4, 16, 64, 256)


def model() -> ConfigDict:
    """The base with pages of text and 256 patches."""
    config = base.get_config()
    config.token_budget = 256
    config.data = ConfigDict(
        {
            "kind": "documents",
            "grids": GRIDS,
            "page_size": PAGE,
            "context_grids": ((16, 16), (8, 16), (8, 8)),
            "task_weights": {"ocr": 1.0, "ocr_line": 1.0},
            "turns_per_page": 2,
            "evaluation_size": 64,
        }
    )
    config.processor.update({"image_size": (PAGE, PAGE), "tokenizer": "documents"})
    # A start token, `READ 8 BY 16` with 128 characters, `READ LINE 8 OF 8 BY 16` with 16, and two end tokens.
    config.row.text_length = 160
    config.encoder.update({"patch_size": PATCH, "width": 64, "depth": 2, "mlp_dim": 192, "remat": "none"})
    config.decoder.update({"width": 64, "depth": 3, "mlp_dim": 192, "remat": "none"})
    config.decoder.rope.theta = 1000.0  # sequences have at most 416 positions
    config.evaluation.update({"batch_size": 64, "question_length": 9, "max_new_tokens": 130})
    return config
