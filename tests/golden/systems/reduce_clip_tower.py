"""Reducers by their released rules on what a whole CLIP tower gives: whose features, attention and keys they read."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.golden import comparison
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.rules import prefixed
from vlm_jax.pretrained import clip
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.types import VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_visionzip_*`, `_prumerge_*`, `_faster_*`, `_vispruner_attn`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        pixels = jnp.asarray(inputs[f"{case}_pixels"].transpose(0, 2, 3, 1))
        params = parameters(folder, case, settings, pixels)
        arrays = of_case(settings, params, pixels)
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def tower(settings: dict, **fields):
    section = {name: settings[name] for name in clip.VISION_DEFAULTS if name in settings}
    return clip.vision_tower(section, "settings.json", pooling="none", final_norm="none", **fields)


def parameters(folder: Path, case: str, settings: dict, pixels: jax.Array) -> dict:
    """Those of all layers."""
    vit, prefix = tower(settings), f"{case}.vision_model."
    shapes = nn.meta.unbox(jax.eval_shape(vit.init, jax.random.key(0), pixels))["params"]
    tensors = {key: tensor for key, tensor in open_checkpoint(folder).items() if key.startswith(prefix)}
    return import_params(prefixed(clip.vision_rules(vit), prefix), tensors, shapes, ignore=(r".*post_layernorm.*",))


def seen(settings: dict, params: dict, pixels: jax.Array, **fields) -> VisualFeatures:
    """What the tower gives, up to its `select_layer`."""
    vit = tower(settings, **fields)
    blocks = jax.tree.map(lambda leaf: leaf[: vit.num_blocks], params["blocks"])
    return jax.jit(lambda params, x: vit.apply({"params": params}, x))({**params, "blocks": blocks}, pixels)


def reduced(reducer: Reducer, features: VisualFeatures) -> VisualFeatures:
    return jax.jit(lambda features: reducer.apply({}, features, deterministic=True))(features)


def of_case(settings: dict, params: dict, pixels: jax.Array) -> dict[str, np.ndarray | jax.Array]:
    released = seen(settings, params, pixels, select_layer=-2, saliency="heads", keep_class_token=True)
    saliency, heads = np.asarray(released.saliency), settings["num_attention_heads"]
    dominant, contextual = settings["dominant_num"] + 1, settings["contextual_num"]  # the class token is dominant
    zip_rule = VisionZip(
        dominant + contextual, contextual_share=contextual / (dominant + contextual), rule="as_released"
    )
    zipped = reduced(zip_rule, released)
    patches = np.asarray(zipped.kept)[:, 1:dominant]
    order = np.argsort(-np.take_along_axis(saliency, patches, axis=1), axis=1, kind="stable")
    # PruMerge reads the attention of the last layer, and features of the one before.
    last = seen(settings, params, pixels, saliency="joined")
    features = VisualFeatures(released.tokens[:, 1:], last.mask, last.grid, saliency=last.saliency, keys=last.keys)
    merged = reduced(PruMerge(1, ratio=settings["prumerge_ratio"], rule="as_released"), features)
    return {
        "visionzip_dominant": np.pad(np.take_along_axis(patches, order, axis=1), ((0, 0), (1, 0))),
        "visionzip_attn": saliency[:, 1:] * heads,
        "visionzip_metric": released.keys.mean(axis=2),
        "visionzip_tokens": zipped.tokens,
        "prumerge_kept": merged.kept[:, :-1],
        "prumerge_attn": last.saliency,
        "prumerge_tokens": merged.tokens,
        "faster_attn": saliency[:, 1:],
        "faster_features": released.tokens[:, 1:],
        "vispruner_attn": saliency[:, 1:],
    }
