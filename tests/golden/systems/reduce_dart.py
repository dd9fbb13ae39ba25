"""DART: one drop by given keys and hidden states."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems.reduce_decoder import places_of
from vlm_jax.decoders.dropping import Rows, drop, numbers_left
from vlm_jax.decoders.duplicates import Pivots, pivots_of, unlike_pivots
from vlm_jax.reducers.dart import DART


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_pivot_image`, `_pivot_text`, `_kept_sorted`, `_keep`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        arrays = of_case(settings, inputs[f"{case}_states"], inputs[f"{case}_keys"])
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_case(settings: dict, states: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    length, start, count = states.shape[1], settings["vision_token_start_index"], settings["vision_token_length"]
    reducer = DART(
        1,
        count,
        9,
        rule="as_released",
        image_pivots=settings["pivot_image_token"],
        text_pivots=settings["pivot_text_token"],
        ratio=settings["reduction_ratio"],
    )
    (coming,) = reducer.drops()
    assert coming.pivots is not None and coming.num_left(count) == settings["kept"]
    places = places_of(length, start + np.arange(count)[None], (np.arange(length) == length - 1)[None])
    segments, every = jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]
    number, x = numbers_left(places, coming), jnp.asarray(states)
    found = pivots_of(jnp.asarray(keys).swapaxes(1, 2), segments, places, number, coming.pivots)
    image, text = np.split(np.asarray(found.index[0, 0]), [coming.pivots[0]])
    # The port goes through the pivots in the order of a Python set, which the settings tell.
    order = jnp.asarray(settings["pivot_order"])[None, None]
    chosen = unlike_pivots(x, segments, places, Pivots(order, jnp.ones(order.shape, bool)), number)
    rows = Rows(x, every, None, jnp.zeros((1, length, 1)), None, segments, None, every)
    left = length - count + coming.num_left(count)
    rows, _ = drop(rows, places, chosen.astype(jnp.float32), number, coming.num_left(count), left)
    return {
        "pivot_image": image,
        "pivot_text": text if len(text) else np.zeros(0, np.float32),
        "kept_sorted": np.flatnonzero(chosen[0]),
        "keep": np.asarray(rows.index[0]),
    }
