"""big_vision's two towers: SigLIP and SigLIP 2, at a fixed size and NaFlex, with losses and gradients."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden.systems.vision_transformer import normalise
from vlm_jax import from_pretrained
from vlm_jax.checkpoints.hub import read_config
from vlm_jax.checkpoints.params import export_params
from vlm_jax.encoders.naflex import interpolate_table
from vlm_jax.losses.two_tower import sigmoid_loss, softmax_loss
from vlm_jax.models.two_tower import Embeddings
from vlm_jax.pretrained import Pretrained
from vlm_jax.types import PackedPatches

Outputs = dict[str, Any]


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> Outputs:
    """Every output array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    wanted = {name: entry for name, entry in manifest.items() if entry["role"] == "output"}
    loaded, text = from_pretrained(folder), jnp.asarray(inputs["text"])
    images = _packed(inputs) if "patches" in inputs else normalise(inputs["images_u8"])
    found = _features(loaded, images, text)
    found |= _losses(found, loaded)
    found |= _parameter_gradients(loaded, images, text)
    found |= _pools(folder, loaded, images, text, wanted)
    if isinstance(images, PackedPatches):
        real = int((inputs["ptype"][0] == 1).sum())
        found["img_encoded"] = found["img_encoded"][:, :real]
        found |= _tables(inputs, wanted)
    for name in ("img_with_posemb", "img_encoded", "txt_transformed", "txt_vocab_logits"):
        if name in wanted:  # of the first examples alone
            found[name] = found[name][: wanted[name]["shape"][0]]
    return {name: np.asarray(found[name]) for name in wanted}


def _packed(inputs: dict[str, np.ndarray]) -> PackedPatches:
    """One image a row; padding has the place (0, 0)."""
    positions = np.stack([inputs["yidx"], inputs["xidx"]], axis=-1)
    sizes = np.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    segments = (inputs["ptype"] == 1).astype(np.int32)
    return PackedPatches(*map(jnp.asarray, (inputs["patches"], positions, sizes, segments)))


def _features(loaded: Pretrained, images: Any, text: jax.Array) -> Outputs:
    module = loaded.module

    @jax.jit
    def run(params, images, text):
        seen = module.image.apply({"params": params["image"]}, images, collect=True)
        read = module.text.apply({"params": params["text"]}, text)
        both = module.apply({"params": params}, images, text)
        logits = module.text.apply({"params": params["text"]}, read.tokens, method="vocabulary_logits")
        return {
            "img_with_posemb": seen.hidden[0],
            "img_encoded": seen.tokens,
            "img_pre_logits": seen.pooled,
            "txt_transformed": read.tokens,
            "txt_logits": read.pooled,
            "img_norm": jnp.linalg.norm(seen.pooled, axis=1, keepdims=True),
            "txt_norm": jnp.linalg.norm(read.pooled, axis=1, keepdims=True),
            "zimg": both.image,
            "ztxt": both.text,
            "t": both.scale[None],
            "b": both.bias[None],
            "logits": both.logits(),
            "txt_vocab_logits": logits,
        }

    return run(loaded.params, images, text)


def _losses(found: Outputs, loaded: Pretrained) -> Outputs:
    """Losses of the embeddings, and their gradients."""

    @jax.jit
    def run(image, text, log_scale, bias):
        def sigmoid(image, text, log_scale, bias):
            return sigmoid_loss(image, text, scale=jnp.exp(log_scale), bias=bias)

        gradients = jax.grad(sigmoid, argnums=(0, 1, 2, 3))(image, text, log_scale, bias)
        names = ("zimg", "ztxt", "t", "b")
        shaped = [x if x.ndim else x[None] for x in gradients]
        scale = jnp.exp(log_scale)
        logits = Embeddings(image, text, scale, bias).logits()
        signs = 2 * jnp.eye(len(image)) - 1
        # All but the second example, as a loss of the smaller batch.
        kept = jnp.asarray([i for i in range(len(image)) if i != 1])
        return {
            **{f"sigmoid_grad_{name}": x for name, x in zip(names, shaped, strict=True)},
            "sigmoid_nll": -jax.nn.log_sigmoid(signs * logits).sum(-1),
            "sigmoid_loss": sigmoid(image, text, log_scale, bias),
            "sigmoid_xent": sigmoid(image, text, log_scale, bias),
            "softmax_loss": softmax_loss(image, text, scale=scale),
            "softmax_ncorrect": (logits.argmax(1) == jnp.arange(len(image))).astype(jnp.float32).mean(),
            "softmax_loss_masked": softmax_loss(image[kept], text[kept], scale=scale),
        }

    return run(found["zimg"], found["ztxt"], loaded.params["log_scale"], loaded.params["bias"])


def _parameter_gradients(loaded: Pretrained, images: Any, text: jax.Array) -> Outputs:
    """Gradients of every parameter, by released name."""

    @jax.jit
    def run(params):
        def loss(params):
            both = loaded.module.apply({"params": params}, images, text)
            return sigmoid_loss(both.image, both.text, scale=both.scale, bias=both.bias)

        return jax.grad(loss)(params)

    released = export_params(loaded.release.rules, run(loaded.params))
    return {f"param_grad_{key.removeprefix('params/').replace('/', '.')}": x for key, x in released.items()}


def _pools(folder: Path, loaded: Pretrained, images: Any, text: jax.Array, wanted: dict[str, Any]) -> Outputs:
    """The towers with other pooling."""
    module, params, found = loaded.module, loaded.params, {}
    for kind in ("first", "mean", "max"):
        if f"txt_pool_{kind}" in wanted:
            tower = module.text.clone(pooling=kind)
            found[f"txt_pool_{kind}"] = jax.jit(tower.apply)({"params": params["text"]}, text).pooled
    for kind in ("gap", "max"):
        if f"pool_{kind}" in wanted:
            tower = module.image.clone(pooling=kind)
            found[f"pool_{kind}"] = jax.jit(tower.apply)({"params": params["image"]}, images).pooled
    if "txt_pool_map" in wanted:
        section = read_config(folder)["model"]
        config = {
            "model_name": section["text_model"],
            "num_classes": section["out_dim"][1],
            "model": {**section["text"], "pool_type": "map"},
        }
        tower = from_pretrained(folder / "text_map.npz", config=config)
        found["txt_pool_map"] = jax.jit(tower.apply)(text).pooled
    return found


def _tables(inputs: dict[str, np.ndarray], wanted: dict[str, Any]) -> Outputs:
    """The position table alone, at other grids."""
    table, found = jnp.asarray(inputs["resize_table"]), {}
    for name in wanted:
        if match := re.fullmatch(r"resize_(\d+)x(\d+)", name):
            rows, cols = map(int, match.groups())
            places = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij"), -1)
            sizes = jnp.broadcast_to(jnp.asarray([rows, cols]), (1, rows * cols, 2))
            found[name] = interpolate_table(table, places.reshape(1, -1, 2), sizes).reshape(rows, cols, -1)
    return found
