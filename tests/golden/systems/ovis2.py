"""Ovis 2: its vision tower (AIMv2), visual vocabulary and Qwen2, official and as ported to transformers.

The tower is given the official pixels, which the folder of the official code lists as an output of its
image processor.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import language, ovis_prompts
from tests.golden.systems.language import Row
from vlm_jax.connectors.visual_vocabulary import gumbel_softmax, straight_through
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.squares import squares


def straight_gradient(connector, logits) -> jax.Array:
    """The gradient of a weighted sum of hard words, in training."""
    weights = jnp.linspace(-1, 1, logits.shape[-1])[None, None]

    def total(logits):
        return jnp.sum(connector.apply({}, logits, deterministic=False, method="words") * weights)

    return jax.grad(total)(logits)[0]


def vocabulary(model, features, expected: dict, entries: dict, inputs: dict) -> dict[str, jax.Array]:
    """Arrays after the tower; those of a way to choose words are named after it."""
    connector, variables = model.module.connector, {"params": model.params["connector"]}
    merged = squares(features, connector.factor, "")[0]
    logits, _ = connector.apply(variables, features, method="logits")
    found = {"vt.features": merged.reshape(*merged.shape[:2], -1), "vt.head_logits": logits}
    if "vt.argmax" in expected:
        found["vt.argmax"] = jnp.argmax(logits, axis=-1)
    hard = "hard_softmax" if "st.grad_port" in expected else "st_argmax"
    for name, tokenize in {"softmax": "softmax", "st_argmax": hard}.items():
        if f"vt.tokens.{name}" not in expected:
            continue
        chosen = connector.clone(tokenize=tokenize)
        columns = expected[f"vt.tokens.{name}"].shape[-1] - logits.shape[-1]  # those of the indicators
        words = chosen.apply(variables, logits, deterministic=False, method="words")
        found[f"vt.tokens.{name}"] = jnp.pad(words, ((0, 0), (0, 0), (0, columns)))
        for deterministic in (False, True):  # a product with the table, and a look-up
            out = chosen.apply(variables, features, deterministic=deterministic)
            if f"vte.embeds.{name}" in found:
                np.testing.assert_allclose(out.tokens, found[f"vte.embeds.{name}"], atol=1e-5)
            found[f"vte.embeds.{name}"] = out.tokens
    for name in (name for name in expected if name.startswith("st.grad")):
        found[name] = straight_gradient(connector.clone(tokenize=hard), logits[:1, : len(expected[name])])
    if "gumbel.noise" in inputs:
        tau = float(re.search(r"tau=(\d+(?:\.\d+)?)", entries["gumbel.soft"]["meaning"]).group(1))
        noise = jnp.asarray(inputs["gumbel.noise"])
        found["gumbel.soft"] = gumbel_softmax(logits[: len(noise)], noise, tau)
        found["gumbel.hard"] = straight_through(found["gumbel.soft"])
    return found


ATOM, FIRST_INDICATOR = -300, -301  # of the official code, which counts indicators downwards


def prompt(model, ids: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> tuple[Row, np.ndarray]:
    """A prompt that shows the first of the crops, and its labels with visual tokens ignored.

    The official ids have one atom for every crop, those of transformers have one for every token.
    """
    module, config = model.module, model.config
    count, first = module.connector.num_tokens(module.encoder.grid(*pixels.shape[1:3])), module.connector.num_indicators
    if "visual_indicator_token_ids" in config:
        index = np.full(len(ids), -1)
        for row, indicator in enumerate(config["visual_indicator_token_ids"]):
            index[ids == indicator] = row
        atoms = ids == config["image_token_id"]
        index[atoms] = first + np.arange(atoms.sum())
        return Row(np.where(index < 0, ids, 0), index, _shown(pixels, atoms.sum() // count)), labels
    crops = iter(first + np.arange(len(pixels) * count).reshape(len(pixels), count))
    parts = []
    for token, label in zip(ids, labels, strict=True):
        rows = next(crops) if token == ATOM else [FIRST_INDICATOR - token if token < 0 else -1]
        parts += [(max(token, 0), row, label) for row in rows]
    tokens, index, labels = np.array(parts).T
    return Row(tokens, index, _shown(pixels, (ids == ATOM).sum())), labels


def _shown(pixels: np.ndarray, count: int) -> np.ndarray | None:
    """The first crops, None of none."""
    return pixels[:count] if count else None


def prompts(model, golden: comparison.Golden, pixels: np.ndarray) -> dict[str, tuple[Row, np.ndarray]]:
    """Every row of the prompt with its labels, which take the crops in order."""
    found, start = {}, 0
    for i, given in enumerate(zip(golden.inputs["mm.input_ids"], golden.inputs["mm.labels"], strict=True)):
        row, labels = prompt(model, *given, pixels[start:] if start < len(pixels) else pixels[:1])
        found[f"mm.{i}"] = row, labels
        start += 0 if row.images is None else len(row.images)
    return found


def spoken(model, golden: comparison.Golden, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The prompt under each way to choose words: embeddings, logits, loss and greedy ids."""
    made = prompts(model, golden, pixels)
    rows, labels = ({name: pair[part] for name, pair in made.items()} for part in (0, 1))
    found = {"mm.expanded_labels": np.stack(list(labels.values()))}
    for tokenize in {name.rsplit(".", 1)[1] for name in golden.expected if name.startswith("mm.logits.")}:
        connector = model.module.connector.clone(tokenize=tokenize)
        whole = dataclasses.replace(model.system, model=model.module.clone(connector=connector))
        variant = dataclasses.replace(model, system=whole)
        name = f"mm.inputs_embeds.{tokenize}"
        official = dict(zip(rows, golden.expected[name], strict=True)) if name in golden.expected else {}
        states = language.of_case(language.states(variant, rows, official), "mm")
        count = golden.expected[f"mm.generated.{tokenize}"].shape[1]
        found |= {
            name: np.stack([state.embeddings for state in states]),
            f"mm.logits.{tokenize}": np.stack([state.logits for state in states]),
            f"mm.loss.{tokenize}": language.loss([state.logits for state in states], list(labels.values())),
            f"mm.generated.{tokenize}": np.stack(list(language.greedy(variant, rows, count).values())),
        }
    return found


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array that the folder's manifest names."""
    golden = comparison.read(folder)
    expected = golden.expected
    pixels = (inputs if "pixel_values" in inputs else expected)["pixel_values"].transpose(0, 2, 3, 1)
    model = vlm_jax.from_pretrained(folder)
    encoder, params = model.module.encoder, model.params["encoder"]

    def encode(module, params):
        return jax.jit(lambda params, x: module.apply({"params": params}, x, collect=True))(params, jnp.asarray(pixels))

    features = encode(encoder, params)
    found = vocabulary(model, features, expected, golden.entries, inputs)
    found |= ovis_prompts.outputs2(golden, model.config)
    found["vit.embeddings"] = features.hidden[0]
    found |= {f"vit.block.{i}": state for i, state in enumerate(features.hidden[1:])}
    if "vit.last_hidden_state" in expected:  # after a norm that the tower has no use for
        scale = model.checkpoint["visual_tokenizer.backbone.trunk.post_trunk_norm.weight"][...]
        norm = Norm("rms", encoder.norm_epsilon)
        found["vit.last_hidden_state"] = norm.apply({"params": {"scale": scale}}, features.hidden[-1])
    if "vt.tokens.softmax_without_final_norm" in expected:
        rest = {name: tree for name, tree in params.items() if name != "final_norm"}
        plain = encode(encoder.clone(final_norm=False), rest)
        variables = {"params": model.params["connector"]}
        logits, _ = model.module.connector.apply(variables, plain, method="logits")
        found["vt.tokens.softmax_without_final_norm"] = jax.nn.softmax(logits, axis=-1)
    found |= spoken(model, golden, pixels)
    return {name: np.asarray(array) for name, array in found.items() if name in expected}
