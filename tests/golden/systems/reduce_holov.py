"""HoloV by its released rule, on visual tokens and the attention to them, and the sequences of Qwen2.5-VL."""

import json
from pathlib import Path

import jax
import numpy as np

from tests.golden import comparison
from tests.golden.systems.reduce_fastervlm import given
from vlm_jax.reducers.behind_connector import positions_of_kept
from vlm_jax.reducers.holov import HoloV


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_allocated`, `_kept`, `_tokens`; of Qwen2.5-VL also `_ids_out` and `_positions_out`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        tokens, attention = inputs[f"{case}_tokens_in"], np.atleast_2d(inputs[f"{case}_attn"])
        features = given(tokens, attention[:, None])
        reducer = HoloV(
            settings.get("new_image_token_num", 1),
            num_crops=settings["num_patches"],
            variety=settings["beta"] if "beta" in settings else settings["alpha"],
            ratio=settings.get("prune_rate"),
            rule="as_released",
        )
        out = jax.jit(lambda features, reducer=reducer: reducer.apply({}, features, deterministic=True))(features)
        crops = jax.tree.map(np.asarray, reducer.crops(features))
        number = np.minimum(crops.shares, crops.sizes).sum(axis=1)
        places = np.where(np.arange(out.tokens.shape[1])[None] < number[:, None], out.kept, -1)
        arrays = {"allocated": crops.shares[-1], "kept": places, "tokens": out.tokens}
        if f"{case}_ids" in inputs:
            arrays["kept"] = places[0]
            arrays |= of_sequence(settings, np.asarray(out.kept), inputs[f"{case}_ids"], inputs[f"{case}_positions"])
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_sequence(settings: dict, kept: np.ndarray, ids: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """The ids and M-RoPE positions that are left; `positions` [3, 1, T]."""
    start = settings["image_token_start"]
    behind = start + settings["num_tokens"]
    of_image = positions[:, 0, start:behind].T[None]
    own = positions_of_kept(of_image, kept, np.arange(kept.shape[1])[None])
    left = np.concatenate([positions[..., :start], np.moveaxis(own, 2, 0), positions[..., behind:]], axis=2)
    index = np.concatenate([np.arange(start), start + kept[0], np.arange(behind, ids.shape[1])])
    return {"ids_out": ids[:, index], "positions_out": left}
