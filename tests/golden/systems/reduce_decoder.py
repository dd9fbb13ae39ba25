"""What the folders of reducers in a decoder share: tiny Llamas of embeddings, and what a drop is given and leaves."""

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.maps.transformer import trunk_rules
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.rules import prefixed
from vlm_jax.decoders import dropping
from vlm_jax.decoders.dropping import Rows
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.layers.rope import Rope
from vlm_jax.types import Drop, VisualPlaces


class Dropped(NamedTuple):
    """One drop.

    Attributes:
      places: before it.
      saliency: attention that each position got.
      rows: what is left.
    """

    places: VisualPlaces
    saliency: np.ndarray | jax.Array
    rows: Rows


def places_of(length: int, index: np.ndarray, ranking: np.ndarray, lengths: tuple[int, ...] = ()) -> VisualPlaces:
    """Places of one image a row at `index` [B, M], `length` where there is none, ranked at the marked positions."""
    assert ranking.shape[1] == length
    return VisualPlaces(jnp.asarray(index)[:, None], jnp.asarray(ranking), lengths)


def llama(settings: dict, drops: tuple[Drop, ...], depth: int) -> Transformer:
    return Transformer(
        vocab_size=1,
        width=settings["hidden_size"],
        depth=depth,
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        mlp_dim=settings["intermediate_size"],
        rope=Rope(settings["rope_theta"]),
        norm_epsilon=settings["rms_norm_eps"],
        drops=drops,
    )


def parameters(folder: Path, case: str, settings: dict) -> dict:
    """Those of all layers and the last norm."""
    module = llama(settings, (), settings["num_hidden_layers"])
    tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, module.width))
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, tokens, tokens))["params"]
    wanted = {name: shapes[name] for name in ("blocks", "final_norm")}
    rules = trunk_rules(qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False)
    tensors = {key: tensor for key, tensor in open_checkpoint(folder).items() if key.startswith(f"{case}.model.")}
    return import_params(prefixed(rules, f"{case}.model."), tensors, wanted)


def run(
    module: Transformer,
    params: dict,
    x: np.ndarray,
    mask: np.ndarray,
    places: VisualPlaces,
    numbers: list[int] | None = None,
) -> tuple[np.ndarray, list[Dropped]]:
    """The last hidden states, at every position, and every drop on the way.

    `numbers` are those of tokens that are left, where the images had more before an earlier drop.
    """
    return watched_run(module, params, x, mask, places, (), numbers)[:2]


def watched_run(
    module: Transformer,
    params: dict,
    x: np.ndarray,
    mask: np.ndarray,
    places: VisualPlaces,
    names: tuple[str, ...],
    numbers: list[int] | None = None,
) -> tuple[np.ndarray, list[Dropped], dict[str, list]]:
    """As `run`, and what every call of functions of `decoders.dropping` returns, by their names."""
    found: list[Dropped] = []
    seen: dict[str, list] = {name: [] for name in names}
    drop = dropping.drop

    def watched(name):
        function = getattr(dropping, name)

        def call(*args):
            seen[name].append(function(*args))
            return seen[name][-1]

        return call

    def recorded(rows, places, saliency, number, most, length):
        number = number if numbers is None else jnp.asarray(numbers)[:, None]
        most = most if numbers is None else max(numbers)
        shorter, moved = drop(rows, places, saliency, number, most, length)
        renumbers = module.drops[len(found)].renumbers
        found.append(Dropped(places, saliency, dropping.renumbered(shorter) if renumbers else shorter))
        return shorter, moved

    @jax.jit
    def traced(params, x, segments):
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        last, _ = module.apply({"params": params}, x, positions, segments, places=places)
        return last, list(found), {name: list(calls) for name, calls in seen.items()}

    with mock.patch.multiple(dropping, drop=recorded, **{name: watched(name) for name in names}):
        return jax.tree.map(np.asarray, traced(params, jnp.asarray(x), jnp.asarray(mask, jnp.int32)))
