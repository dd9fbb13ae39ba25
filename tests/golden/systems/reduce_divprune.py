"""DivPrune by its released rule, on visual tokens after a projector, and the sequence that it leaves."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.divprune import DivPrune, cosine_distances
from vlm_jax.types import VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_distance`, `_chosen`, `_kept_sorted`, `_tokens`; `<case>_keep`, `_embeds_out` of whole sequences."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        whole = inputs.get(f"{case}_embeds")
        front, count = settings.get("in_front", 0), settings["num_tokens"]
        tokens = inputs[f"{case}_tokens_in"] if whole is None else whole[0, front : front + count]
        features = VisualFeatures(jnp.asarray(tokens)[None], jnp.ones((1, count), bool), (1, count))
        reducer = DivPrune(1, rule="as_released", ratio=settings["threshold_ratio"])
        out = jax.jit(lambda features, reducer=reducer: reducer.apply({}, features, deterministic=True))(features)
        if whole is None:
            found[f"{case}_distance"] = cosine_distances(features)[0]
            found[f"{case}_chosen"] = reducer.chosen(features)[0]
            found[f"{case}_kept_sorted"], found[f"{case}_tokens"] = out.kept[0], out.tokens[0]
            continue
        behind = np.arange(front + count, whole.shape[1])
        found[f"{case}_keep"] = np.concatenate([np.arange(front), front + np.asarray(out.kept[0]), behind])
        found[f"{case}_embeds_out"] = np.concatenate([whole[:, :front], out.tokens, whole[:, behind]], axis=1)
    return {name: np.asarray(array) for name, array in found.items() if name in expected}
