"""CLIP under OpenAI's names, as open_clip runs it: ViT and ResNet towers, loss and gradients."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import from_pretrained
from vlm_jax.checkpoints.params import export_params
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.resize import resize_axis
from vlm_jax.losses.two_tower import softmax_loss
from vlm_jax.pretrained import Pretrained

Outputs = dict[str, Any]


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> Outputs:
    """Every output array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    wanted = {name: entry for name, entry in manifest.items() if entry["role"] == "output"}
    loaded = from_pretrained(folder)
    images, text = _pixels(loaded, inputs["images_u8"]), jnp.asarray(inputs["text"], jnp.int32)
    found = _features(loaded, images, text)
    found |= _image_layers(loaded, images[:1])
    found |= _loss(loaded, images, text)
    if "resized_image_u8" in inputs:
        found |= _resized(folder, loaded, inputs, wanted)
    return {name: np.asarray(found[name]) for name in wanted}


def _pixels(loaded: Pretrained, images: np.ndarray) -> jax.Array:
    """(x / 255 - mean) / std."""
    mean, std = (np.asarray(loaded.config["preprocess_cfg"][name], np.float32) for name in ("mean", "std"))
    return jnp.asarray((images.astype(np.float32) / 255 - mean) / std)


def _features(loaded: Pretrained, images: jax.Array, text: jax.Array) -> Outputs:
    module = loaded.module

    @jax.jit
    def run(params, images, text):
        read = module.text.apply({"params": params["text"]}, text, collect=True)
        both = module.apply({"params": params}, images, text)
        return {
            **{f"text_block{i}": hidden[:1] for i, hidden in enumerate(read.hidden[1:])},
            "ln_final": read.tokens[:1],
            "image_features": module.apply({"params": params}, images, method="encode_image"),
            "text_features": read.pooled,
            "image_features_norm": both.image,
            "text_features_norm": both.text,
            "logits_per_image": both.logits(),
            "logits_per_text": both.logits().T,
            "logit_scale_exp": both.scale,
        }

    return run(loaded.params, images, text)


def _image_layers(loaded: Pretrained, images: jax.Array) -> Outputs:
    tower, params = loaded.module.image, loaded.params["image"]
    if isinstance(tower, ViT):
        bare = tower.clone(pooling="none", projection_dim=None, keep_class_token=True)
        features = jax.jit(lambda p, x: bare.apply({"params": p}, x, collect=True))(params, images)
        blocks = {f"visual_block{i}": hidden for i, hidden in enumerate(features.hidden[1:])}
        return {"ln_pre": features.hidden[0], **blocks, "ln_post": features.tokens}

    @jax.jit
    def run(params, images):
        return tower.apply({"params": params}, images, mutable=["intermediates"], capture_intermediates=True)[1]

    sown = run(params, images)["intermediates"]
    maps = {name: value["__call__"][0] for name, value in sown.items() if name != "__call__"}
    stem = jax.nn.relu(maps["stem_norm3"])
    side = stem.shape[1] // 2
    stem = stem.reshape(1, side, 2, side, 2, -1).mean((2, 4))
    stages = {f"layer{i}": maps[f"stage{i}_block{count - 1}"] for i, count in enumerate(tower.layers, 1)}
    return {name: value.transpose(0, 3, 1, 2) for name, value in {"stem": stem, **stages}.items()}


def _loss(loaded: Pretrained, images: jax.Array, text: jax.Array) -> Outputs:
    """The loss, and its gradients by released name."""

    @jax.jit
    def run(params):
        def loss(params):
            both = loaded.module.apply({"params": params}, images, text)
            return softmax_loss(both.image, both.text, scale=both.scale)

        return jax.value_and_grad(loss)(params)

    value, gradients = run(loaded.params)
    released = export_params(loaded.release.rules, gradients)
    return {"clip_loss": value, **{f"grad_{key}": x for key, x in released.items()}}


def _resized(folder: Path, loaded: Pretrained, inputs: dict[str, np.ndarray], wanted: dict[str, Any]) -> Outputs:
    """The image tower for another image size, and the text tower's table at another length."""
    image = inputs["resized_image_u8"]
    resized = from_pretrained(folder, image_size=image.shape[1])
    params = resized.params["image"]
    run = jax.jit(lambda p, x: resized.module.image.apply({"params": p}, x).pooled)
    length = wanted["resized_text_pos"]["shape"][0]
    return {
        "resized_visual_pos": jnp.concatenate([params["class_position"], params["positions"]["table"]]),
        "resized_text_pos": resize_axis(loaded.params["text"]["positions"], 0, length, "bilinear"),
        "resized_image_features": run(params, _pixels(resized, image)),
    }
