"""ToMe: matching and merging of one block, block after block, and in a whole ViT."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.golden import comparison
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.token_merging import Merged, match, merge, run_merging

NOT_COMPARED = {
    r".*_unmerge": "nothing here spreads merged tokens over their first places again",
    r"tie_best_value": "a match says which tokens are nearest, not how near",
    r"r\d+_schedule": "tokens merged in each block are solved from the budget, or given one by one",
    r"vit.*_origin": "a run through blocks carries sizes and first places, not members",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every case of the settings: one block, a chain of them (`projections`), ties, or a ViT (`pixels`)."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_pixels" in inputs:
            arrays = of_vit(folder, case, settings, inputs[f"{case}_pixels"])
        elif f"{case}_projections" in inputs:
            arrays = of_chain(settings, inputs[f"{case}_x"], inputs[f"{case}_projections"])
        elif f"{case}_metric" in inputs:
            arrays = of_block(settings, case, inputs)
        else:
            continue
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    names = set(expected) - {name for name in found if name.endswith("_unmerge")}
    return {name: np.asarray(array) for name, array in found.items() if name in names}


def prefix(settings: dict) -> int:
    return int(settings.get("class_token", False)) + int(settings.get("distill_token", False))


def of_block(settings: dict, case: str, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    metric = jnp.asarray(inputs[f"{case}_metric"])
    batch, length, _ = metric.shape
    num_prefix = prefix(settings)
    count = min(settings["r"], (length - num_prefix) // 2)
    matched = match(metric, None, count, num_prefix=num_prefix, released=True)
    arrays = {"unmerged": matched.stays, "source": matched.source, "target": matched.target}
    arrays["count"] = jnp.asarray(length - count)
    every = match(metric, None, (length + 1) // 2, num_prefix=num_prefix)
    arrays["best"] = jnp.take_along_axis(every.target, jnp.argsort(every.source, axis=1), axis=1)
    if f"{case}_x" not in inputs:
        return arrays
    sizes = jnp.asarray(inputs.get(f"{case}_size", np.ones((batch, length, 1), np.float32)))[..., 0]
    units = jnp.broadcast_to(jnp.eye(length)[None], (batch, length, length))
    tokens, origin = (one_merge(x, sizes, metric, count, num_prefix) for x in (jnp.asarray(inputs[f"{case}_x"]), units))
    return arrays | {"tokens": tokens.x, "sizes": tokens.size[..., None], "origin": (origin.x > 0).astype(jnp.float32)}


def one_merge(x: jax.Array, sizes: jax.Array, metric: jax.Array, count: int, num_prefix: int) -> Merged:
    place = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    tokens = Merged(x, sizes, place, None)
    return merge(tokens, metric[:, :, None], count, num_prefix=num_prefix, released=True) if count else tokens


def of_chain(settings: dict, x: np.ndarray, projections: np.ndarray) -> dict[str, jax.Array]:
    batch, length, _ = x.shape
    tokens, num_prefix = jnp.asarray(x), prefix(settings)
    sizes, origin = jnp.ones((batch, length)), jnp.broadcast_to(jnp.eye(length)[None], (batch, length, length))
    for projection, asked in zip(projections, settings["schedule"], strict=True):
        metric, count = tokens @ projection, min(asked, (tokens.shape[1] - num_prefix) // 2)
        merged, of = (one_merge(y, sizes, metric, count, num_prefix) for y in (tokens, origin))
        tokens, sizes, origin = jnp.tanh(merged.x), merged.size, of.x
    return {"tokens": tokens, "sizes": sizes[..., None], "origin": (origin > 0).astype(jnp.float32)}


def of_vit(folder: Path, case: str, settings: dict, pixels: np.ndarray) -> dict[str, jax.Array]:
    weights = {
        key.removeprefix(f"{case}."): np.asarray(tensor)
        for key, tensor in open_checkpoint(folder).items()
        if key.startswith(f"{case}.")
    }
    patch, width, depth = settings["patch_size"], settings["embed_dim"], settings["depth"]
    side = pixels.shape[2] // patch
    cut = pixels.reshape(len(pixels), 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["patch_embed.proj.weight"].reshape(width, -1)
    x = cut.reshape(len(pixels), side * side, -1) @ kernel.T + weights["patch_embed.proj.bias"]
    if settings["class_token"]:
        x = np.concatenate([np.broadcast_to(weights["cls_token"], (len(x), 1, width)), x], axis=1)
    x, num_prefix = jnp.asarray(x + weights["pos_embed"]), prefix(settings)
    first, step = settings["r"] if isinstance(settings["r"], list) else (settings["r"], 0)
    slope = 2 * first * step / (depth - 1)  # from first - first * step to first + first * step
    asked = [int(first - first * step + slope * layer) for layer in range(depth)]
    counts, left = [], x.shape[1]
    for number in asked:
        counts.append(min(number, (left - num_prefix) // 2))
        left -= counts[-1]
    block = {
        "num_heads": settings["num_heads"],
        "mlp_dim": int(settings["mlp_ratio"] * width),
        "activation": "gelu",
        "norm": "layer",
        "norm_epsilon": settings["layer_norm_eps"],
    }
    stack = TransformerStack(depth, block)

    def run(stack: TransformerStack, x: jax.Array) -> Merged:
        return run_merging(
            stack, x, None, tuple(counts), num_prefix=num_prefix, released=True, proportional=settings["prop_attn"]
        )

    params = {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *[timm_block(weights, i) for i in range(depth)])}
    tokens = jax.jit(lambda params, x: nn.apply(run, stack)({"params": params}, x))(params, x)
    out = tokens.x
    if "norm.weight" in weights:
        norm = {"scale": weights["norm.weight"], "bias": weights["norm.bias"]}
        out = Norm("layer", settings["layer_norm_eps"]).apply({"params": norm}, out)
    return {"tokens": out, "sizes": tokens.size[..., None]}


def timm_block(weights: dict[str, np.ndarray], layer: int) -> dict:
    """The parameters of one block."""

    def dense(weight: np.ndarray, bias: np.ndarray) -> dict:
        return {"kernel": weight.T, "bias": bias}

    own = {
        key.removeprefix(f"blocks.{layer}."): tensor
        for key, tensor in weights.items()
        if key.startswith(f"blocks.{layer}.")
    }
    parts = zip(np.split(own["attn.qkv.weight"], 3), np.split(own["attn.qkv.bias"], 3), strict=True)
    heads = {name: dense(*part) for name, part in zip(("query", "key", "value"), parts, strict=True)}
    norms = {
        ours: {"scale": own[f"{name}.weight"], "bias": own[f"{name}.bias"]}
        for ours, name in {"attention_norm": "norm1", "mlp_norm": "norm2"}.items()
    }
    mlp = {
        ours: dense(own[f"mlp.{n}.weight"], own[f"mlp.{n}.bias"]) for ours, n in {"up": "fc1", "down": "fc2"}.items()
    }
    return {"attention": {**heads, "out": dense(own["attn.proj.weight"], own["attn.proj.bias"])}, "mlp": mlp, **norms}
