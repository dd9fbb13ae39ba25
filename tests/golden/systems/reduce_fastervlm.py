"""FasterVLM, on features and the class token's attention to them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.fastervlm import FasterVLM
from vlm_jax.types import VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_scores`, `_chosen`, `_mask`, `_tokens`; `<case>_kept_scores` where some are equal."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        features = given(inputs[f"{case}_features"], inputs[f"{case}_attn"])
        reducer = FasterVLM(settings["visual_token_num"], rule="as_released")
        out = jax.jit(lambda features, reducer=reducer: reducer.apply({}, features, deterministic=True))(features)
        saliency, kept = np.asarray(features.saliency), np.asarray(out.kept)
        chosen = falling(saliency, kept)
        arrays = {
            "scores": saliency,
            "chosen": chosen,
            "mask": (kept[..., None] == np.arange(saliency.shape[1])).any(axis=1),
            "tokens": out.tokens,
            "kept_scores": np.take_along_axis(saliency, chosen, axis=1)[0],
        }
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def given(features: np.ndarray, attention: np.ndarray) -> VisualFeatures:
    """Features [B, N, D] with the attention [B, heads, N] to them."""
    saliency = jnp.asarray(attention).mean(axis=1)
    keys = jnp.zeros((*saliency.shape, 1, 1))
    return VisualFeatures(
        jnp.asarray(features), jnp.ones(saliency.shape, bool), (1, saliency.shape[1]), saliency=saliency, keys=keys
    )


def falling(saliency: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The indices `kept` by falling attention."""
    order = np.argsort(-np.take_along_axis(saliency, kept, axis=1), axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)
