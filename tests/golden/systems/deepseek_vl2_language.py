"""What DeepSeek-VL2 makes of prompts: every layer of a text, images among text, a padded batch, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems import deepseek_vl2_prompts, language
from tests.golden.systems.language import IGNORED, Row
from vlm_jax.checkpoints.params import export_params
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.layers.attention import KeyValue
from vlm_jax.layers.scan import LOSSES
from vlm_jax.losses.cross_entropy import cross_entropy

CAPTURED = ("attention", "mlp", "router", "layers", "final_norm")


def read_rows(golden: comparison.Golden, ours: Any) -> dict[str, Row]:
    """The text, and the conversations with pictures."""
    rows = {"text": language.text(golden.inputs["text.input_ids"][0])}
    for name, (messages, images) in deepseek_vl2_prompts.said(golden).items():
        batch = ours.processor(messages, images, add_generation_prompt=name != "sft")
        rows[name] = Row(batch.tokens[0], batch.visual_index[0], batch.images[0] if images else None)
    return rows


def text_states(ours: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every layer's parts for one text, and what the first one leaves in the cache."""
    decoder: Deepseek = ours.module.decoder
    batch = jax.tree.map(jnp.asarray, language.batch([language.text(ids)], ours.module))

    @jax.jit
    def run(params):
        return ours.module.apply(
            {"params": params},
            batch,
            cache_length=len(ids),
            method="prefill",
            capture_intermediates=lambda module, method: method == "__call__" and module.name in CAPTURED,
        )

    (_, cache), state = run(ours.params)
    kept = state["intermediates"]["decoder"]
    found = {"text.hidden.0": decoder.apply({"params": ours.params["decoder"]}, batch.tokens, method="embed")}
    found["text.hidden.final"] = kept["final_norm"]["__call__"][0]
    for name, layers in decoder.stacks():
        stack = kept[name]["layers"]
        for i, layer in enumerate(layers):
            found[f"text.attn_out.{layer}"] = stack["attention"]["__call__"][0][0][i]
            found[f"text.mlp_out.{layer}"] = stack["mlp"]["__call__"][0][i]
            found[f"text.hidden.{layer + 1}"] = stack["__call__"][0][0][i]
            if "router" in stack["mlp"]:
                expert, weight = (np.asarray(leaf[i])[0] for leaf in stack["mlp"]["router"]["__call__"][0])
                dense = np.zeros((len(ids), decoder.num_experts), np.float32)
                np.put_along_axis(dense, expert, weight, axis=-1)
                found[f"text.router_idx.{layer}"] = np.sort(expert, axis=-1)
                found[f"text.router_weights.{layer}"] = dense
    first = jax.tree.map(lambda leaf: leaf[0], cache.layers[0])
    if isinstance(first, KeyValue):
        found["text.cache0.0"], found["text.cache0.1"] = first.key.swapaxes(2, 3), first.value
    else:
        found["text.cache0.0"], found["text.cache0.1"] = first.rope_key[:, None], first.latent[:, None]
    return {name: np.asarray(array) for name, array in found.items()}


def trained(ours: Any, row: Row, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The loss, and its gradients with and without the routers' balance losses, under the released names."""
    batch = jax.tree.map(jnp.asarray, language.batch([row], ours.module))
    targets, learned = jnp.asarray(np.maximum(labels[None, 1:], 0)), jnp.asarray(labels[None, 1:] != IGNORED)

    def losses(params):
        logits, sown = ours.module.apply({"params": params}, batch, mutable=[LOSSES])
        value, _ = cross_entropy(logits[:, :-1], targets, learned.astype(jnp.float32))
        return value, sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))

    value, back = jax.vjp(jax.jit(losses), ours.params)
    (alone,), (balance,) = back((1.0, 0.0)), back((0.0, 1.0))
    rules = ours.release.rules
    both = export_params(rules, jax.tree.map(jnp.add, alone, balance))
    found = {"train.loss": value[0], **{f"train.grad.{name}": array for name, array in both.items()}}
    return found | {f"train.grad_ce_only.{name}": array for name, array in export_params(rules, alone).items()}


def outputs(golden: comparison.Golden, ours: Any) -> dict[str, np.ndarray]:
    """Every array after the processor and the projector."""
    inputs, expected, rows = golden.inputs, golden.expected, read_rows(golden, ours)
    found = text_states(ours, inputs["text.input_ids"][0])
    logits = language.logits(ours, rows)
    for case in ("text", "mm"):
        found[f"{case}.logits"] = logits[case][None]
    prompts = [case for case in rows if case.startswith("batch.")]
    count = golden.entries["batch.last_logits"]["shape"][1]
    found["batch.last_logits"] = np.stack([logits[case][-count:] for case in prompts])
    labels = {"text": inputs["text.labels"][0], "sft": expected["sft.labels"][0]}
    for case, of_case in labels.items():
        found[f"{case}.loss"] = language.loss([logits[case]], [of_case])
    pictured = language.batch([rows["mm"]], ours.module)
    found["mm.inputs_embeds"] = jax.jit(lambda batch: ours.apply(batch, method="embed")[0])(pictured)
    continued = {case: rows[case] for case in ("text", "mm", *prompts)}
    new = language.greedy(ours, continued, expected["text.generated"].shape[1])
    found["text.generated"], found["mm.generated"] = new["text"][None], new["mm"][None]
    found["batch.generated"] = np.stack([new[case] for case in prompts])
    if "train.loss" in expected:
        found |= trained(ours, rows["sft"], labels["sft"])
    return {name: np.asarray(array) for name, array in found.items() if name in expected}
