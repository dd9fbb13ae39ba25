"""The ViT paper's quantities against golden arrays that were computed from the official code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.analysis.vit_definitions import NAMES, definitions
from tests.golden import comparison
from tests.golden.conftest import DATA
from vlm_jax.encoders.vit import ViT

FOLDERS = [
    folder for folder in comparison.find(DATA) if any(NAMES.fullmatch(n) for n in comparison.read(folder).expected)
]


def test_there_are_folders():
    assert FOLDERS


def released_params(folder, config):
    """The released arrays under the package's names."""
    released = dict(np.load(folder / "model.npz"))
    depth, width = config["transformer"]["num_layers"], config["hidden_size"]

    def stacked(name, *shape):
        return np.stack([released[f"Transformer/encoderblock_{i}/{name}"].reshape(shape) for i in range(depth)])

    def dense(name, *kernel):
        return {"kernel": stacked(f"{name}/kernel", *kernel), "bias": stacked(f"{name}/bias", kernel[1])}

    def norm(name):
        return {part: stacked(f"{name}/{part}", width) for part in ("scale", "bias")}

    attention, mlp = "MultiHeadDotProductAttention_1", config["transformer"]["mlp_dim"]
    layers = {
        "attention_norm": norm("LayerNorm_0"),
        "attention": {n: dense(f"{attention}/{n}", width, width) for n in ("query", "key", "value", "out")},
        "mlp_norm": norm("LayerNorm_2"),
        "mlp": {
            "up": dense("MlpBlock_3/Dense_0", width, mlp),
            "down": dense("MlpBlock_3/Dense_1", mlp, width),
        },
    }
    params = {
        "patch_embed": {part: released[f"embedding/{part}"] for part in ("kernel", "bias")},
        "blocks": {"layers": layers},
        "final_norm": {part: released[f"Transformer/encoder_norm/{part}"] for part in ("scale", "bias")},
    }
    table = released["Transformer/posembed_input/pos_embedding"]
    if "cls" not in released:
        return params | {"positions": {"table": table[0]}}
    first = {"class_token": released["cls"][0], "class_position": table[0, :1]}
    return params | first | {"positions": {"table": table[0, 1:]}}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_definitions_hold(folder):
    golden = comparison.read(folder)
    config = json.loads((folder / "config.json").read_text())
    transformer, size = config["transformer"], config["patches"]["size"][0]
    fields = {"patch_size": size, "width": config["hidden_size"], "depth": transformer["num_layers"]}
    fields |= {"num_heads": transformer["num_heads"], "mlp_dim": transformer["mlp_dim"]}
    images = (golden.inputs["images_u8"].astype(np.float32) - 127.5) / 127.5
    params = released_params(folder, config)
    has_class = "class_token" in params
    module = ViT(image_size=images.shape[1:3], class_token=has_class, class_position=has_class, **fields)
    found = jax.tree.map(np.asarray, definitions(folder, module, params, jnp.asarray(images)))
    assert set(found) == {name for name in golden.expected if NAMES.fullmatch(name)}
    wrong = {
        name: comparison.compare(golden.entries[name], value, golden.expected[name]) for name, value in found.items()
    }
    assert not {name: line for name, line in wrong.items() if line}
