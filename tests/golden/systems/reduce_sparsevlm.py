"""SparseVLM: scores of given attention maps, single mergings, and every drop of a tiny Llama's prefill."""

import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems import reduce_decoder as shared
from vlm_jax.decoders import raters
from vlm_jax.reducers.sparsevlm import SparseVLM


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of models the raters, what every drop is given and keeps, and the last states; of the others one step."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        own = {name.removeprefix(f"{case}_"): array for name, array in inputs.items() if name.startswith(f"{case}_")}
        if "embeds" in own:
            arrays = of_model(folder, case, settings, own)
        elif "x" in own:
            arrays = of_cluster(settings, own)
        else:
            arrays = of_score(settings, own)
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_cluster(settings: dict, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, number = jnp.asarray(own["x"])[:, None], settings["cluster_num"]
    found = jax.jit(raters.cluster, static_argnums=3)(
        x, jnp.ones(x.shape[:3], bool), jnp.full(x.shape[:2], number), number, 1e-6 * own["noise"][0]
    )
    return {"centers": found.centers[:, 0], "assigned": found.assigned[:, 0], "merged": found.means[:, 0]}


def of_score(settings: dict, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Queries are unit vectors, and keys the logarithms of the maps, whose softmax they are."""
    attention, start, count = own["attn"], settings["v_token_start"], settings["v_token_num"]
    batch, heads, length, _ = attention.shape
    query = jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, heads, length))
    given = raters.Heads(query, jnp.transpose(jnp.log(attention), (0, 3, 1, 2)) * length**0.5)
    index = start + np.arange(count)[None]
    places = shared.places_of(length, index, (np.arange(length) == length - 1)[None])
    told = {"RETAIN_TOKN": settings["RETAIN_TOKN"], "USE_VERSION": "1_0"}
    number = [2, 6, 15].index(settings["layer_idx"])
    # The drop alone: its image has `count` tokens now, whatever the earlier ones left.
    rating = drops_of(told, count, 17)[number].rating
    rating = rating._replace(counts=rating.counts[-1:])
    of_text = jnp.isin(jnp.arange(length), start + count + own["raters"])[None, None]

    @jax.jit
    def run():
        scores = raters.relevance(given, raters.Context("full"), of_text, places, rating)
        segments = jnp.ones((batch, length), jnp.int32)
        return scores, raters.rated(jnp.zeros((batch, length, 1)), segments, places, scores, places, rating)

    scores, left = run()
    assert rating.numbers(count).kept == settings["kept"]
    return {"relevance": scores[:, 0], "mask": kept_of(left, index[0], settings["kept"])[None]}


def kept_of(left: raters.Rated, index: np.ndarray, number: int) -> np.ndarray:
    """Which of an image's tokens at `index` are kept: the first `number` of what is left of it."""
    found = index[np.asarray(left.left[0])[index]]
    return np.isin(index, np.asarray(left.source[0])[found[:number]])


def drops_of(settings: dict, count: int, depth: int) -> tuple:
    version = settings["USE_VERSION"].replace("_", ".")
    counts = {
        "1.0": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
        "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
    }[version][settings["RETAIN_TOKN"]]
    layers = tuple(settings.get("pruning_layers", (2, 6, 15)))
    reducer = SparseVLM(1, count, depth, rule="as_released", version=version, layers=layers, counts=counts)
    return reducer.drops()


def of_model(folder: Path, case: str, settings: dict, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    depth, count, x = settings["num_hidden_layers"], settings["image_shape"], own["embeds"]
    drops, start, length = drops_of(settings, count, depth), settings["v_token_start"], x.shape[1]
    module, params = shared.llama(settings, drops, depth), shared.parameters(folder, case, settings)
    index = start + np.arange(count)
    places = shared.places_of(length, index[None], (np.arange(length) == length - 1)[None])
    noise = [jnp.asarray(1e-6 * own[name][0]) for name in sorted(own) if name.startswith("noise")]
    with mock.patch.object(raters, "tie_noise", side_effect=noise):
        last, dropped, seen = shared.watched_run(
            module, params, x, np.ones(x.shape[:2], bool), places, ("raters_of", "relevance", "rated")
        )
    (chosen,) = seen["raters_of"]
    rows = dropped[-1].rows
    arrays = {
        "raters": np.flatnonzero(chosen[0, 0]) - start - count,
        "position_ids": rows.positions,
        "last": last[:, rows.index[0]],
    }
    left = [drop.num_left(count) for drop in drops]
    assert left == [settings["visual_tokens_after_layer"][drop.layer] for drop in drops]
    for number, (one, scores, found) in enumerate(zip(dropped, seen["relevance"], seen["rated"], strict=True)):
        there = one.places.index[0, 0]
        arrays[f"relevance{number}"] = scores[:, 0]
        arrays[f"mask{number}"] = kept_of(found, there, drops[number].rating.numbers(count).kept)[None]
    return arrays
