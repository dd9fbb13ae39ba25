"""Single functions of DeepSeek-VL2: its projectors, of every kind, routers, rotary positions and the loss."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.checkpoints.maps.deepseek import half_split
from vlm_jax.checkpoints.params import import_params
from vlm_jax.layers.rope import Rope, rotate, yarn_magnitude
from vlm_jax.layers.router import Router
from vlm_jax.layers.scan import LOSSES
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiles import DeepSeekVL2Views
from vlm_jax.processors.tiling import best_resolution
from vlm_jax.types import VisualFeatures

NOT_COMPARED = {
    r"gate\.4\.dense": (
        "weights of up to 16, which the official code itself rounds to within 2e-6 of their float64 values, where 1e-6 "
        "is allowed; the experts are compared, and such weights in tests/layers/test_router.py"
    ),
    r"projector\.\d+\.param\..*|gate\.\d+\.(weight|bias)": (
        "parameters, which are listed as outputs and are what the projectors and the routers are given"
    ),
}
_IGNORED = -100


def _projected(settings: dict, x: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray | jax.Array:
    if settings["projector_type"] == "identity":
        return x
    connector, rules = mlp_projector(settings, "projectors", source="projector")
    features = VisualFeatures(jnp.asarray(x), jnp.ones(x.shape[:2], bool), (settings["grid"],) * 2)
    init = functools.partial(connector.init, deterministic=True)
    params = import_params(rules, tensors, jax.eval_shape(init, jax.random.key(0), features)["params"])
    return jax.jit(functools.partial(connector.apply, deterministic=True))({"params": params}, features).tokens


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Projectors, routers and rotary positions under the settings of `meta.json`, and the others of the folder."""
    golden, meta, found = comparison.read(folder), json.loads((folder / "meta.json").read_text()), {}
    expected = golden.expected
    for i, settings in enumerate(meta["projectors"]):
        stem = f"projector.{i}."
        given = f"{stem}param."
        tensors = {f"projector.{name.removeprefix(given)}": x for name, x in expected.items() if name.startswith(given)}
        found[f"{stem}y"] = _projected(settings, inputs[f"{stem}x"], tensors)
    targets = jnp.asarray(inputs["loss.labels"][:, 1:])
    kept = targets != _IGNORED
    logits = jnp.asarray(inputs["loss.logits"][:, :-1])
    found["loss.value"] = cross_entropy(logits, jnp.where(kept, targets, 0), kept.astype(jnp.float32))[0]
    found |= _resolutions(expected, golden.entries["resolution.table"]["meaning"])
    for i, settings in enumerate(meta["gates"]):
        routed = _routed(f"gate.{i}.", settings, inputs, expected)
        found |= {name: array for name, array in routed.items() if not any(re.fullmatch(p, name) for p in NOT_COMPARED)}
    for i, settings in enumerate(meta["ropes"]):
        found |= _waves(f"rope.{i}.", settings)
    found |= _turned(inputs, meta["ropes"][0]["base"])
    pairs = re.findall(r"\(([\d.]+),([\d.]+)\)", golden.entries["yarn_get_mscale"]["meaning"])
    magnitudes = [yarn_magnitude(float(factor), float(weight)) for factor, weight in pairs]
    found["yarn_get_mscale"] = np.array(magnitudes, np.float32)
    return {name: np.asarray(array) for name, array in found.items()}


def _routed(stem: str, settings: dict, inputs: dict, expected: dict) -> dict[str, np.ndarray]:
    """Experts, their weights and the two balance losses of one router, as the folder names them."""
    x, params = jnp.asarray(inputs[f"{stem}x"]), {"kernel": jnp.asarray(expected[f"{stem}weight"]).T}
    if f"{stem}bias" in expected:
        params["bias"] = jnp.asarray(expected[f"{stem}bias"])
    found = {}
    for over, name in (("sequence", "aux_seq"), ("batch", "aux_tok")):
        router = Router(
            num_experts=settings["n_routed_experts"],
            num_selected=settings["num_experts_per_tok"],
            scoring=settings["scoring_func"],
            selection=settings["topk_method"],
            num_groups=settings["n_group"],
            num_selected_groups=settings["topk_group"],
            normalize=settings["norm_topk_prob"] and settings["num_experts_per_tok"] > 1,
            scale=settings["routed_scaling_factor"],
            balance_weight=settings["aux_loss_alpha"],
            balance_over=over,
        )
        routing, sown = router.apply({"params": params}, x, mutable=[LOSSES])
        if f"{stem}{name}" in expected:
            found[f"{stem}{name}"] = sown[LOSSES]["balance"][0]
    expert = np.asarray(routing.expert).reshape(-1, settings["num_experts_per_tok"])
    dense = np.zeros((len(expert), settings["n_routed_experts"]), np.float32)
    np.put_along_axis(dense, expert, np.asarray(routing.weight).reshape(expert.shape), axis=-1)
    return {f"{stem}idx": np.sort(expert, axis=-1), f"{stem}dense": dense, **found}


# The official classes -> what a config calls the scaling.
_SCALINGS = {
    "DeepseekV2RotaryEmbedding": None,
    "DeepseekV2LinearScalingRotaryEmbedding": "linear",
    "DeepseekV2DynamicNTKScalingRotaryEmbedding": "dynamic",
    "DeepseekV2YarnRotaryEmbedding": "yarn",
}


def _waves(stem: str, settings: dict) -> dict[str, np.ndarray]:
    """Cosines and sines of all positions, for both halves of a head."""
    kind, length = _SCALINGS[settings["cls"]], settings["seq_len"]
    scaling = {**settings, "type": kind, "factor": settings.get("scaling_factor")} if kind else None
    length_in_training = {"max_position_embeddings": settings["max_position_embeddings"]}
    config = {**ROPE_DEFAULTS, "rope_theta": settings["base"], "rope_scaling": scaling, **length_in_training}
    rope = released_rope(config, settings["cls"], settings["dim"])
    angles = rope.angles(jnp.arange(length)[None], settings["dim"], jnp.full((1, length), length))[0]
    angles = np.concatenate([angles, angles], axis=-1)
    return {f"{stem}cos": rope.magnitude * np.cos(angles), f"{stem}sin": rope.magnitude * np.sin(angles)}


def _turned(inputs: dict, base: float) -> dict[str, np.ndarray]:
    """Rotary parts, whose coordinates the checkpoint's rules put in order."""
    found = {}
    for name in ("q", "k"):
        x = inputs[f"rope.apply.{name}"]
        order, positions = half_split(x.shape[-1]), jnp.asarray(inputs["rope.apply.pos"], jnp.int32)
        heads = jnp.asarray(x[..., order]).swapaxes(1, 2)
        turned = rotate(heads, Rope(float(base)).angles(positions, x.shape[-1]))
        found[f"rope.apply.{name}_out"] = turned.swapaxes(1, 2)
    return found


def _resolutions(expected: dict[str, np.ndarray], meaning: str) -> dict[str, np.ndarray]:
    """The canvas of every size of the table; the released candidates are listed as an output."""
    candidates = expected["resolution.candidates"]
    side, tokens = map(int, re.search(r"tile (\d+).*-> (\d+)x", meaning).groups())
    views = DeepSeekVL2Views(
        Pixels(), side, (tokens, tokens), tuple((height, width) for width, height in candidates.tolist())
    )
    rows = []
    for width, height, *_ in expected["resolution.table"].tolist():
        (layout,), grid = views.layouts([(height, width)]), views.grid((height, width), 1)
        best = best_resolution((height, width), views.canvases)
        rows.append([width, height, *best[::-1], *grid[::-1], len(layout)])
    return {"resolution.candidates": candidates, "resolution.table": np.array(rows)}
