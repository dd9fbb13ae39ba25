"""Qwen-VL's prompts, only text and with images named by path: logits, loss and greedy ids."""

import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.golden.comparison import Golden
from tests.golden.systems import language
from tests.golden.systems.language import Row
from vlm_jax import from_pretrained
from vlm_jax.layers.rope import prompt_growth

# Names of arrays of other settings -> the settings.
VARIANTS = {"no_ntk_no_logn": {"use_dynamic_ntk": False, "use_logn_attn": False}, "ntk_only": {"use_logn_attn": False}}


def row(ids: np.ndarray, start: int, pictures: dict[str, np.ndarray]) -> Row:
    """A prompt whose images' tokens are between `start` and the id after it, where ids spell their paths."""
    index, shown, count = np.full(len(ids), -1), [], 0
    for first, last in zip(np.flatnonzero(ids == start), np.flatnonzero(ids == start + 1), strict=True):
        path = bytes(int(i) for i in ids[first + 1 : last] if i < 256).decode()
        shown.append(pictures[path])
        index[first + 1 : last] = count + np.arange(last - first - 1)
        count += last - first - 1
    return Row(ids, index, np.stack(shown) if shown else None)


def outputs(golden: Golden, ours: Any, pictures: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every array after the resampler.

    Args:
      golden: the folder.
      ours: the loaded model.
      pictures: pixels of the folder's pictures by file name.
    """
    inputs, expected = golden.inputs, golden.expected
    start = ours.config["visual"]["image_start_id"]
    cases = [name.removesuffix("_ids") for name in inputs if name.endswith("_ids")]
    masks = {case: inputs.get(f"{case}_mask", np.ones_like(inputs[f"{case}_ids"])) > 0 for case in cases}
    rows = {}
    for case in cases:
        for i, (ids, mask) in enumerate(zip(inputs[f"{case}_ids"], masks[case], strict=True)):
            rows[f"{case}.{i}"] = row(ids[mask], start, pictures)
    states = language.states(ours, rows)
    found: dict[str, Any] = {}
    for case in cases:
        these = language.of_case(states, case)
        if (name := f"{case}_logits") in expected:
            found[name] = language.shown_rows(golden, name, [state.logits for state in these])
        if f"{case}_loss" in expected:
            labels = [row[mask] for row, mask in zip(inputs[f"{case}_labels"], masks[case], strict=True)]
            found[f"{case}_loss"] = language.loss([state.logits for state in these], labels)
        if f"{case}_hidden0" in expected:
            found[f"{case}_hidden0"] = np.stack([state.embeddings for state in these])
    for ending, choose in {"_greedy_cache": language.greedy, "_greedy_recompute": language.greedy_anew}.items():
        found |= language.greedy_cases(golden, ours, rows, ending, choose)
    for name in expected:
        if match := re.fullmatch(rf"(\w+)_logits_({'|'.join(VARIANTS)})", name):
            case, settings = match.group(1), VARIANTS[match.group(2)]
            config = json.loads((golden.folder / "config.json").read_text())
            other = from_pretrained(golden.folder, config={**config, **settings})
            these = {name: rows[name] for name in rows if name.rpartition(".")[0] == case}
            logits = language.logits(other, these)
            found[name] = language.shown_rows(golden, name, language.of_case(logits, case))
    if "ntk_alpha_table" in expected:
        lengths = expected["ntk_alpha_table"][:, 0]
        growth = prompt_growth(jnp.asarray(lengths, jnp.int32), ours.config["seq_length"])
        found["ntk_alpha_table"] = np.stack([lengths, growth], axis=1)
    return {name: array for name, array in found.items() if name in expected}
