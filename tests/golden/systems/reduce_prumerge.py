"""PruMerge and PruMerge+ by their released rule, on features, queries and keys of a class token and patches."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.layers.attention import Context
from vlm_jax.layers.saliency import Heads, attention_saliency
from vlm_jax.reducers.prumerge import PruMerge, left_out
from vlm_jax.types import VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_cls_attn`, `_kept`, `_compl`, `_tokens`; `<case>_kept` of counted outliers."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        count = settings["num_tokens"]
        if f"{case}_outliers" in inputs:
            ratios = [outliers / count for outliers in inputs[f"{case}_outliers"].tolist()]
            found[f"{case}_kept"] = [PruMerge(1, rule="as_released", ratio=r).num_salient(count) for r in ratios]
            continue
        found |= {f"{case}_{name}": array for name, array in of_case(settings, case, inputs).items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_case(settings: dict, case: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    hidden, query, key = (jnp.asarray(inputs[f"{case}_{name}"]) for name in ("hidden", "q", "k"))
    heads, class_token = Heads(query[:, :, None], key[:, :, None]), jnp.zeros(hidden.shape[:2]).at[:, 0].set(1)
    saliency = attention_saliency(heads, Context("full"), class_token)[:, 1:]
    reducer = PruMerge(
        1,
        rule="as_released",
        num_neighbors=settings["neighbors"],
        ratio=settings["reduction_ratio_used"],
        adaptive=settings["if_adaptive"],
        spatial_share=0.5 if settings["variant"].endswith("+") else 0.0,
    )
    mask = jnp.ones(saliency.shape, bool)
    features = VisualFeatures(hidden[:, 1:], mask, (1, mask.shape[1]), saliency=saliency, keys=key[:, 1:, None])
    out = jax.jit(lambda features: reducer.apply({}, features, deterministic=True))(features)
    assert reducer.num_left(mask.shape[1]) == out.tokens.shape[1]
    shown = np.asarray(out.mask)  # a spatial feature that is salient too is masked; images have as many of them
    kept = np.stack([row[real] for row, real in zip(np.asarray(out.kept), shown, strict=True)])[:, :-1]
    twice = jnp.asarray([len(row) - len(set(row.tolist())) for row in kept])
    others = np.asarray(left_out(jnp.asarray(kept), twice, mask.shape[1]))
    return {
        "cls_attn": saliency,
        "kept": kept,
        "compl": np.stack([np.flatnonzero(row) for row in others]),
        "tokens": np.stack([row[real] for row, real in zip(np.asarray(out.tokens), shown, strict=True)]),
    }
