"""FastV: one drop by given attention maps, and in tiny Llamas."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems import reduce_decoder as shared
from vlm_jax.decoders.dropping import Rows, drop, numbers_left
from vlm_jax.reducers.fastv import FastV

NOT_COMPARED = {
    r".*mask_last": "this way only hides dropped tokens from attention; here they are gone, and no state is computed",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_chosen`, `_keep`, `_position_ids`, `_hidden_out`, `_scores`, `_last`, and counts of one release."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_embeds" in inputs:
            arrays = of_model(folder, case, settings, inputs[f"{case}_embeds"])
        elif f"{case}_attn" in inputs:
            arrays = of_maps(settings, inputs[f"{case}_attn"], inputs.get(f"{case}_hidden"))
        else:
            pairs = zip(inputs[f"{case}_length"].tolist(), settings["r"], strict=True)
            drops = [(FastV(1, 1, 9, rule="as_released", ratio=ratio).drops()[0], count) for count, ratio in pairs]
            arrays = {"kept": np.asarray([told.num_left(count) for told, count in drops], np.int32)}
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {
        name: np.asarray(array) for name, array in found.items() if name in expected and not name.endswith("mask_last")
    }


def image(settings: dict) -> np.ndarray:
    return settings["sys_length"] + np.arange(settings["image_token_length"])


def places(settings: dict, length: int) -> shared.VisualPlaces:
    return shared.places_of(length, image(settings)[None], (np.arange(length) == length - 1)[None])


def by_attention(settings: dict, keep: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The tokens that are kept, by falling attention."""
    kept = np.intersect1d(keep, image(settings))
    return kept[np.argsort(-saliency[kept], kind="stable")]


def of_maps(settings: dict, attention: np.ndarray, hidden: np.ndarray | None) -> dict[str, np.ndarray]:
    last = attention if attention.ndim == 3 else attention[:, :, -1]
    saliency = jnp.asarray(last.mean(axis=1))
    length, count = saliency.shape[1], settings["image_token_length"]
    told = {"ratio": settings["ratio"]} if "ratio" in settings else {}
    reducer = FastV(settings.get("attention_rank", count), count, 99, rule="as_released", **told)
    coming, given = reducer.drops()[0], places(settings, length)
    x, every = jnp.zeros((1, length, 1)) if hidden is None else jnp.asarray(hidden), jnp.arange(length)[None]
    rows = Rows(x, every, None, jnp.zeros((1, length, 1)), None, jnp.ones((1, length), jnp.int32), None, every)
    rows, _ = drop(rows, given, saliency, numbers_left(given, coming), count, length - count + coming.num_left(count))
    keep = np.asarray(rows.index[0])
    chosen = by_attention(settings, keep, np.asarray(saliency[0]))
    return {"chosen": chosen, "keep": keep, "position_ids": rows.positions, "hidden_out": rows.x}


def of_model(folder: Path, case: str, settings: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    depth, count = settings["num_hidden_layers"], settings["image_token_length"]
    drops = FastV(settings["attention_rank"], count, depth, layer=settings["agg_layer_K"], rule="as_released").drops()
    module, params = shared.llama(settings, drops, depth), shared.parameters(folder, case, settings)
    mask = np.ones(x.shape[:2], bool)
    last, (dropped,) = shared.run(module, params, x, mask, places(settings, x.shape[1]))
    keep, saliency = dropped.rows.index[0], dropped.saliency[0]
    return {
        "chosen": by_attention(settings, keep, saliency),
        "keep": keep,
        "last": last[:, keep],
        "scores": saliency[image(settings)],
    }
