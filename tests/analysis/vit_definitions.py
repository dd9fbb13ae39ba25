"""The arrays of the ViT paper's figures, by the names that golden folders give them.

They are definitions, computed from weights, parameters and images that any implementation may supply; a
folder of another system leaves some out, and only those that its manifest names are returned.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.analysis.attention_distance import mean_attention_distance
from vlm_jax.analysis.filters import filter_components
from vlm_jax.analysis.position_similarity import position_similarity
from vlm_jax.analysis.probe import attention_weights, first_filters, position_embeddings

NAMES = re.compile(r"attn\d+|mean_attn_distance(_renorm)?|pos_cos_sim|filter_(pcs|sv)_(un)?centred")


def definitions(folder: Path, module: Any, params: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every output of the folder's manifest whose name is in `NAMES`.

    Args:
      folder: a golden folder of a vision transformer.
      module: an encoder that `vlm_jax.analysis.probe` can read.
      params: the folder's weights in the encoder's layout.
      images: the folder's images, normalised; all of them.
    """
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    wanted = [name for name, entry in manifest.items() if entry["role"] == "output" and NAMES.fullmatch(name)]
    weights = np.asarray(attention_weights(module, params, images))
    table = position_embeddings(module, params, images)
    kernel = np.asarray(first_filters(module, params, images))
    rows, cols = table.shape[:2]
    found = {}
    with np.load(folder / "cases.npz") as cases:
        for name in wanted:
            shape = manifest[name]["shape"]
            if name.startswith("attn"):
                found[name] = weights[int(name[4:]), : shape[0]]
            elif name.startswith("mean_attn_distance"):
                renormalise = name.endswith("_renorm")
                size = kernel.shape[0]
                found[name] = mean_attention_distance(weights, (rows, cols), size, renormalise=renormalise)
            elif name == "pos_cos_sim":
                found[name] = position_similarity(table).reshape(rows * cols, rows * cols)
            else:
                filters = filter_components(kernel, shape[0], centred=not name.endswith("_uncentred"))
                is_picture = "_pcs_" in name
                found[name] = _with_signs_of(cases[name], filters.components) if is_picture else filters.singular_values
    return found


def _with_signs_of(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Components are compared up to sign: two entries of almost equal magnitude may decide it otherwise."""
    dots = np.einsum("kijc,kijc->k", ours, theirs)
    return ours * np.where(dots < 0, -1, 1).astype(ours.dtype)[:, None, None, None]
