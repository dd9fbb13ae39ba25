"""CDPruner, on tokens behind a projector and CLIP embeddings of patches and text."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.cdpruner import CDPruner, conditional_kernel
from vlm_jax.types import Guidance, VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_relevance`, `_kernel`, `_kept_sorted`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        tokens = jnp.asarray(inputs[f"{case}_features"]) @ inputs[f"{case}_projector"]
        image, text = inputs[f"{case}_image_embeds"], inputs[f"{case}_text_embeds"]
        of_all = jnp.broadcast_to(text[None], (len(image), *text.shape))  # every image has all texts of the batch
        guidance = Guidance(jnp.asarray(image), of_all, jnp.ones(of_all.shape[:2], bool))
        features = VisualFeatures(tokens, jnp.ones(tokens.shape[:2], bool), (1, tokens.shape[1]), guidance=guidance)
        reducer = CDPruner(settings["visual_token_num"], rule="as_released")

        @jax.jit
        def run(features, reducer=reducer):
            relevance = reducer.relevance(features)
            left = reducer.apply({}, features, deterministic=True)
            return relevance, conditional_kernel(features, relevance), left

        relevance, kernel, left = run(features)
        assert left.mask.all()
        arrays = {"relevance": relevance, "kernel": kernel, "kept_sorted": left.kept, "tokens": left.tokens}
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}
