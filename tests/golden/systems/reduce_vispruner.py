"""VisPruner, on features and the class token's attention to them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems.reduce_fastervlm import given
from vlm_jax.reducers.vispruner import VisPruner

NOT_COMPARED = {
    "runs_ok": "where the release's loop fails, the first half is here the longer one, and no more leave than it has",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_important`, `_diverse`, `_kept_sorted`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_features" not in inputs:
            continue
        features = given(inputs[f"{case}_features"], inputs[f"{case}_attn"])
        reducer = VisPruner(
            settings["visual_token_num"], important_share=settings["important_ratio"], rule="as_released"
        )
        out = jax.jit(lambda features, reducer=reducer: reducer.apply({}, features, deterministic=True))(features)
        chosen = np.asarray(jax.jit(reducer.chosen)(features))
        arrays = {
            "important": chosen[:, : reducer.num_important],
            "diverse": chosen[:, reducer.num_important :],
            "kept_sorted": jnp.asarray(out.kept),
            "tokens": out.tokens,
        }
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}
