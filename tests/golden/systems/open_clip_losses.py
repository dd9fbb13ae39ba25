"""open_clip's losses on the full batch, and what each of its ranks saw in data-parallel training.

The ranks become devices of a mesh. `local_loss` and `gather_with_grad` are options of open_clip that
the package leaves out (without them a rank's loss or its gradient is not that of the full batch),
so the gathering they ask for is written here, around the package's definition of the loss.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.exchange import device_loss
from vlm_jax.losses.pairwise import Towers
from vlm_jax.losses.two_tower import LOSSES, distillation_loss, pack, sigmoid_loss, softmax_loss

EXCHANGES = {"bidir": "ring", "shift": "shift", "reduce": "reduce", "gather": "gather"}
Outputs = dict[str, Any]


def _gradients(prefix: str, names: list[str], loss: Callable[..., Any], *arguments: Any) -> Outputs:
    grads = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
    return {f"{prefix}_grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def _teacher(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "teacher_image_features": inputs["dimg"],
        "teacher_text_features": inputs["dtxt"],
        "teacher_scale": inputs["dscale"],
    }


def _full_batch(inputs: dict[str, np.ndarray]) -> Outputs:
    features = (jnp.asarray(inputs["img"]), jnp.asarray(inputs["txt"]))
    scale, sigmoid_scale, bias = (jnp.asarray(inputs[name]) for name in ("scale", "sscale", "bias"))
    block_size = max(len(inputs["img"]) // 2 - 1, 1)  # several tiles and, as a rule, a rest

    def distill(image, text, scale):
        return distillation_loss(image, text, scale=scale, block_size=block_size, **_teacher(inputs))

    def clip(image, text, scale):
        return softmax_loss(image, text, scale=scale, block_size=block_size)

    def siglip(image, text, scale, bias):
        return sigmoid_loss(image, text, scale=scale, bias=bias, block_size=block_size)

    contrastive, distilled = distill(*features, scale)
    names = ["img", "txt", "scale"]
    return {
        "clip_full_loss": clip(*features, scale),
        "clip_full_loss_bias": softmax_loss(*features, scale=scale, bias=bias),
        **_gradients("clip_full", names, clip, *features, scale),
        "distill_full_contrastive": contrastive,
        "distill_full_distill": distilled,
        **_gradients("distill_full_distill", names, lambda *x: distill(*x)[1], *features, scale),
        **_gradients("distill_full_sum", names, lambda *x: sum(distill(*x)), *features, scale),
        "siglip_full_loss": sigmoid_loss(*features, scale=sigmoid_scale, bias=bias),
        "siglip_full_loss_chunked": siglip(*features, sigmoid_scale, bias),
        **_gradients("siglip_full", [*names, "bias"], siglip, *features, sigmoid_scale, bias),
        "siglip_full_grad_log_scale": jax.grad(lambda x: siglip(*features, jnp.exp(x), bias))(jnp.log(sigmoid_scale)),
    }


def _ranks(world: int) -> Mesh:
    devices = jax.devices()
    if len(devices) < world:
        raise ValueError(f"expected at least {world} devices for the {world} ranks, got {len(devices)}")
    return Mesh(np.array(devices[:world]), ("rank",))


def _gathering_ranks(kind: str, local: bool, with_grad: bool, inputs: dict[str, np.ndarray], world: int) -> Outputs:
    objective = LOSSES["distillation" if kind == "distill" else "softmax"]
    teacher = _teacher(inputs) if objective.has_teacher else {}
    teacher_scale = teacher.pop("teacher_scale", None)

    def rank(image, text, scale, teacher):
        scales = {} if teacher_scale is None else {"teacher_scale": teacher_scale}
        own, scalars = pack(objective, image, text, scale=scale, bias=0.0, **teacher, **scales)
        every = jax.tree.map(lambda x: jax.lax.all_gather(x, "rank", tiled=True), own)
        first = jax.lax.axis_index("rank") * len(image)
        if not with_grad:
            every = jax.lax.stop_gradient(every)
        if not local:
            put = jax.lax.dynamic_update_slice_in_dim
            every = every if with_grad else Towers(*jax.tree.map(lambda x, y: put(x, y, first, 0), every, own))
            own, first = every, 0
        return jnp.stack(objective.full(own, every, scalars, first))[None]

    ranks = jax.jit(jax.shard_map(rank, mesh=_ranks(world), in_specs=P("rank"), out_specs=P("rank")))
    arguments = (inputs["img"], inputs["txt"], jnp.full(world, inputs["scale"]))
    losses = ranks(*arguments, teacher)
    prefix = f"{kind}_local{local:d}_grad{with_grad:d}"
    return {
        f"{prefix}_loss_per_rank": losses if objective.has_teacher else losses[:, 0],
        **_gradients(prefix, ["img", "txt", "scale"], lambda *x: jnp.sum(ranks(*x, teacher)), *arguments),
    }


def _exchanging_ranks(name: str, inputs: dict[str, np.ndarray], world: int) -> Outputs:
    inner = device_loss("sigmoid", "rank", exchange=EXCHANGES[name], block_size=2)

    def mean_over_ranks(image, text, scale, bias):
        return inner(image, text, scale=scale, bias=bias)

    ranks = jax.shard_map(mean_over_ranks, mesh=_ranks(world), in_specs=P("rank"), out_specs=P())
    scale, bias = (jnp.full(world, inputs[name]) for name in ("sscale", "bias"))
    arguments = (jnp.asarray(inputs["img"]), jnp.asarray(inputs["txt"]), scale, bias)
    towers, scalars = pack(LOSSES["sigmoid"], *arguments[:2], scale=inputs["sscale"], bias=inputs["bias"])
    per_rank = []
    for first, rows in zip(
        range(0, len(towers.image), len(towers.image) // world), jnp.split(towers.image, world), strict=True
    ):
        per_rank += LOSSES["sigmoid"].full(towers._replace(image=rows), towers, scalars, first)
    # A rank's own loss is counted once, where the mean over ranks counts it 1 / world times.
    prefix = f"siglip_{name}"
    return {
        f"{prefix}_loss_per_rank": jnp.stack(per_rank),
        **_gradients(prefix, ["img", "txt", "scale", "bias"], lambda *x: world * ranks(*x), *arguments),
    }


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output array that the folder's manifest names."""
    world = int(inputs["layout"][0])
    found = _full_batch(inputs)
    for kind in ("clip", "distill"):
        for local in (False, True):
            for with_grad in (False, True):
                found |= _gathering_ranks(kind, local, with_grad, inputs, world)
    for name in EXCHANGES:
        found |= _exchanging_ranks(name, inputs, world)
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    return {name: np.asarray(found[name]) for name, entry in manifest.items() if entry["role"] == "output"}
