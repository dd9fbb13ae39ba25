"""What the contract tests of families need: a small released config of each model type."""

import pytest


@pytest.fixture
def released_config(model_type):
    return {
        "plain_vit": {
            "model_type": "plain_vit",
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        }
    }[model_type]
