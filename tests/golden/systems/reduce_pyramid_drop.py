"""PyramidDrop: every drop of a tiny Llama's prefill, and single drops of padded batches."""

import json
from pathlib import Path

import jax
import numpy as np

from tests.golden import comparison
from tests.golden.systems import reduce_decoder as shared
from vlm_jax.reducers.pyramid_drop import PyramidDrop

IGNORED = -100  # label of what is not learned


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of models what every drop is given and leaves, and the last states; of `rank` cases one drop."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_embeds" in inputs:
            arrays = of_model(folder, case, settings, inputs[f"{case}_embeds"])
        else:
            own = {name.removeprefix(f"{case}_"): inputs[name] for name in inputs if name.startswith(f"{case}_")}
            arrays = of_drop(folder, case, settings, own)
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_model(folder: Path, case: str, settings: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    depth, count = settings["num_hidden_layers"], settings["image_tokens"]
    ratios = tuple(settings["image_token_ratio_list"][1:])
    layers = tuple(settings["layer_list"])
    drops = PyramidDrop(1, count, depth, rule="as_released", layers=layers, ratios=ratios).drops()
    module, params = shared.llama(settings, drops, depth), shared.parameters(folder, case, settings)
    length = x.shape[1]
    index = settings["image_at"] + np.arange(count)
    places = shared.places_of(length, index[None], (np.arange(length) == length - 1)[None])
    last, dropped = shared.run(module, params, x, np.ones(x.shape[:2], bool), places)
    arrays, there = {}, index
    for number, one in enumerate(dropped):
        keep = np.asarray(one.rows.index[0])
        now = np.asarray(one.places.index[0, 0])
        arrays[f"scores{number}"] = one.saliency[0][now[now < one.saliency.shape[1]]]
        arrays[f"kept{number}"] = np.flatnonzero(np.isin(there, keep))
        arrays[f"position_ids{number}"] = one.rows.positions
        there = np.intersect1d(there, keep)
    return arrays | {"kept_at_end": there - settings["image_at"], "last": last[:, dropped[-1].rows.index[0]]}


def of_drop(folder: Path, case: str, settings: dict, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, mask, labels = own["features"], own["mask"], own.get("labels")
    length, layer, stage = mask.shape[1], settings["rank_layer"], settings["stage"]
    ratio = settings["image_token_ratio_list"][stage + 1]
    coming = PyramidDrop(1, 1, 2, rule="as_released", layers=(1,), ratios=(ratio,)).drops()[0]
    first, now = settings["image_tokens_first"], settings["image_tokens_now"]
    number = np.arange(max(now))[None]
    index = np.where(number < np.asarray(now)[:, None], np.asarray(settings["image_at"])[:, None] + number, length)
    ranking = np.arange(length)[None] == mask.sum(1)[:, None] - 1
    if settings["training"] and labels is not None:
        learned = labels != IGNORED
        ranking = ~learned & np.pad(learned[:, 1:], ((0, 0), (0, 1)))
    left = [real - before + coming.num_left(n) for real, before, n in zip(mask.sum(1), now, first, strict=True)]
    places = shared.places_of(length, index, ranking, (max(int(n) for n in left),))
    params = shared.parameters(folder, case, settings)
    params["blocks"] = jax.tree.map(lambda leaf: leaf[layer : layer + 1], params["blocks"])
    module = shared.llama(settings, (coming._replace(layer=0, ranked_by=0),), 1)
    _, (dropped,) = shared.run(module, params, x, mask, places, [coming.num_left(count) for count in first])
    # The padding of a row may be among its tokens; the release pads after them.
    order = np.argsort(dropped.rows.segment_ids == 0, axis=1, kind="stable")
    rows = jax.tree.map(lambda leaf: np.stack([row[at] for row, at in zip(leaf, order, strict=True)]), dropped.rows)
    real = rows.segment_ids > 0
    arrays = {
        "keep": np.where(real, rows.index, -1),
        "features_out": np.where(real[..., None], rows.x, 0),
        "mask_out": real,
        "position_ids": rows.positions,
    }
    if labels is not None:
        arrays["labels_out"] = np.where(
            real, np.take_along_axis(labels, np.where(real, rows.index, 0), axis=1), IGNORED
        )
    return arrays
