"""DeepSeek-OCR as a whole: ids and views of prompts, image rows, hidden states, logits, losses and greedy ids."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import language
from vlm_jax.generation.engine import generate
from vlm_jax.generation.sampling import Sampling
from vlm_jax.pretrained.processing.deepseek_ocr import mode
from vlm_jax.types import Batch


def load(folder: pathlib.Path):
    """The folder's checkpoint, with the processing sizes that it gives."""
    ours = vlm_jax.from_pretrained(folder)
    told = json.loads((folder / "tiny_registry.json").read_text())["processing"]
    options = {key: told[key] for key in ("min_crops", "max_crops", "crop_threshold")}
    views = mode(ours.processor.views.pixels, told["base_size"], told["image_size"], told["crop_mode"], **options)
    return ours, dataclasses.replace(ours.processor, views=views)


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder."""
    golden = comparison.read(folder)
    ours, processor = load(folder)
    prompts = [name.removesuffix(".prompt") for name in inputs if name.endswith(".prompt")]
    pictures = {name: picture(golden, name) for name in prompts}
    said = [[{"role": "user", "content": str(inputs[f"{name}.prompt"])}] for name in prompts]
    images = [[] if pictures[name] is None else [pictures[name]] for name in prompts]
    batch = processor.batch(said, images)
    states = jax.tree.map(np.asarray, forward(ours, batch))
    found: dict[str, Any] = {}
    for row, name in enumerate(prompts):
        real = batch.segment_ids[row] > 0
        own = [part[row][..., real, :] for part in states]
        found |= of_prompt(golden, name, batch, row, own)
        if pictures[name] is not None:
            found |= of_picture(processor, name, pictures[name])
    found |= greedy(golden, ours, batch, prompts, processor.pad_id)
    found |= batched(golden, ours, processor, prompts, said, images)
    return {name: np.asarray(array) for name, array in found.items() if name in golden.expected}


def picture(golden: comparison.Golden, name: str) -> np.ndarray | None:
    """The picture of a prompt, which the manifest names."""
    told = re.search(r"goes with `(\w+)`", golden.entries[f"{name}.prompt"]["meaning"])
    written = "<image>" in str(golden.inputs[f"{name}.prompt"])
    return golden.inputs[told.group(1) if told else "image"] if written else None


def forward(ours: Any, batch: Batch) -> tuple[jax.Array, ...]:
    """Embeddings, the input of every layer [B, L, T, D], the last norm's output and logits."""

    def run(model, batch):
        given = model.embed(batch)
        hidden, _ = model.decoder(given.x, given.positions, given.segment_ids)
        return given.x, hidden, model.decoder.logits(hidden)

    @jax.jit
    def apply(params, batch):
        captured = {"capture_intermediates": lambda part, method: method == "__call__" and part.name == "layers"}
        (x, hidden, logits), state = ours.module.apply({"params": params}, batch, method=run, **captured)
        kept, layers = state["intermediates"]["decoder"], [x]
        for name, numbers in ours.module.decoder.stacks():
            after = kept[name]["layers"]["__call__"][0][0]
            layers += [after[i] for i in range(len(numbers))]
        return x, jnp.stack([*layers[:-1], hidden], axis=1), logits

    return apply(ours.params, jax.tree.map(jnp.asarray, batch))


def of_prompt(
    golden: comparison.Golden, name: str, batch: Batch, row: int, own: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of one prompt; own are its embeddings, hidden states and logits."""
    embeddings, hidden, logits = own
    real = batch.segment_ids[row] > 0
    visual = batch.visual_index[row][real] >= 0
    found = {
        f"{name}.input_ids": batch.tokens[row][real][None].astype(np.int64),
        f"{name}.images_seq_mask": visual[None],
        f"{name}.image_embeds": embeddings[visual],
        f"{name}.logits": last(golden, f"{name}.logits", logits),
    }
    for layer, states in enumerate(hidden):
        found[f"{name}.hidden.{layer}"] = last(golden, f"{name}.hidden.{layer}", states)
    if (labels := golden.inputs.get(f"{name}.labels")) is not None:
        found[f"{name}.loss"] = language.loss([logits], [labels[0]])
    return found


def last(golden: comparison.Golden, name: str, states: np.ndarray) -> np.ndarray:
    """The last positions of an array [T, D], as many as the manifest holds, as [1, n, D]."""
    return states[-golden.expected[name].shape[1] :][None] if name in golden.expected else states[None]


def of_picture(processor: Any, name: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The views of a picture."""
    (image,) = processor.views.images([Image.fromarray(pixels)])
    found = {
        f"{name}.images_spatial_crop": np.array([(processor.views.grid(pixels.shape[:2]) or (1, 1))[::-1]]),
        f"{name}.pixel_values": image.pixels.transpose(0, 3, 1, 2),
    }
    if image.parts is not None:
        found[f"{name}.images_crop"] = image.parts.transpose(0, 3, 1, 2)
    return found


def greedy(
    golden: comparison.Golden, ours: Any, batch: Batch, prompts: list[str], pad_id: int
) -> dict[str, np.ndarray]:
    """The most likely ids of every prompt, and those without a repeated n-gram."""
    found = {}
    endings = {"greedy": Sampling()}
    sizes = [name for name in golden.inputs if name.endswith(".no_repeat_ngram_size")]
    if sizes:
        endings["greedy_norepeat"] = Sampling(no_repeat_ngram=int(golden.inputs[sizes[0]]))
    for ending, sampling in endings.items():
        lengths = [golden.expected[name].shape[1] for name in golden.expected if name.endswith(f".{ending}")]
        made = generate(
            ours.module,
            ours.params,
            batch,
            max_new_tokens=max(lengths),
            pad_id=pad_id,
            sampling=sampling,
            chunk=max(lengths),
        )
        for name, tokens in zip(prompts, made.tokens, strict=True):
            key = f"{name}.{ending}"
            if key in golden.expected:
                found[key] = tokens[None, : golden.expected[key].shape[1]].astype(np.int64)
    return found


def batched(
    golden: comparison.Golden, ours: Any, processor: Any, prompts: list[str], said: list, images: list
) -> dict[str, np.ndarray]:
    """The rows of the batch, as the manifest names them: `rows mm and plain`."""
    if "batch.input_ids" not in golden.entries:
        return {}
    told = re.search(r"rows ([\w, ]+?), left padded", golden.entries["batch.input_ids"]["meaning"])
    assert told is not None
    rows = [prompts.index(name) for name in re.split(r", | and ", told.group(1))]
    batch = processor.batch([said[row] for row in rows], [images[row] for row in rows])
    _, _, logits = forward(ours, batch)
    count = golden.expected["batch.greedy"].shape[1]
    made = generate(ours.module, ours.params, batch, max_new_tokens=count, pad_id=processor.pad_id, chunk=count)
    real = batch.segment_ids > 0
    return {
        "batch.input_ids": batch.tokens.astype(np.int64),
        "batch.attention_mask": real.astype(np.int64),
        "batch.images_seq_mask": batch.visual_index >= 0,
        "batch.position_ids": np.where(real, batch.positions, 1).astype(np.int64),
        "batch.last_logits": logits[:, -golden.expected["batch.last_logits"].shape[1] :],
        "batch.greedy": made.tokens.astype(np.int64),
    }
