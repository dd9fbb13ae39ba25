"""DeepSeek-VL2's processor: tiles, and the ids, masks and labels of conversations."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tests.golden import comparison
from vlm_jax.pretrained.processing import deepseek
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.spelled_prompt import USER

IGNORED = -100


class Official:
    """A conversation in the arrays of the official processor."""

    def __init__(self, processor: Processor, pieces: list, pictures: list[np.ndarray], *, inference: bool):
        """Takes the pieces of a conversation, with the end of its last answer, which is left out for inference."""
        self.processor, self.seen = processor, processor.views.images([Image.fromarray(x) for x in pictures])
        self.sizes = [picture.shape[:2] for picture in pictures]
        layouts = iter(processor.views.layouts(self.sizes))
        # Of every piece: ids, whether they are learned, whether an image is there.
        parts = []
        for piece in pieces:
            if isinstance(piece, Slot):
                count = len(next(layouts))
                parts.append(([piece.token_id] * count, [False] * count, [True] * count))
            else:
                count = len(piece.ids)
                parts.append((list(piece.ids), [piece.learned] * count, [False] * count))
        joined = (np.concatenate([*part]) for part in zip(*parts, strict=True))
        length = -1 if inference and parts[-1][0] == [processor.tokenizer.eos_id] else None
        self.ids, self.learned, self.visual = (part[:length] for part in joined)

    def arrays(self) -> dict[str, Any]:
        crops = [self.processor.views.grid(size, len(self.sizes))[::-1] for size in self.sizes]
        return {
            "input_ids": self.ids.astype(np.int64),
            "images_seq_mask": self.visual.astype(bool),
            "images_spatial_crop": np.array(crops or [[0, 0]]),
            "num_image_tokens": np.array(self.processor.count_visual_tokens(self.sizes), np.int64),
            "n_tiles": np.array(max(sum(len(seen.pixels) for seen in self.seen), 1)),
            "labels_mask_prompt0": self.labels(False),
            "labels_mask_prompt1": self.labels(True),
        }

    def labels(self, mask_prompt: bool) -> np.ndarray:
        """Ids where they are learned, or of all text; the official code leaves the first as it is."""
        masked = self.visual.astype(bool) | (mask_prompt & ~self.learned.astype(bool))
        return np.where(masked & (np.arange(len(masked)) > 0), IGNORED, self.ids).astype(np.int64)


def conversations(processor: Processor, inputs: dict, listed: dict) -> dict[str, Official]:
    """Every conversation and prompt of the folder, by name."""
    prompt, found = processor.prompt, {}
    for entry in listed["conversations"]:
        pictures = [inputs[f"image.{number}"] for number in entry["images"]]
        pieces, inference = prompt(entry["conversation"], (), targets=True), entry["inference_mode"]
        made = Official(processor, pieces, pictures, inference=inference)
        # The release writes the head of an answer behind every question, in training too.
        ends_open = inference or entry["conversation"][-1]["role"] in USER
        images = [Image.fromarray(picture) for picture in pictures]
        batch = processor(entry["conversation"], images, add_generation_prompt=ends_open)
        np.testing.assert_array_equal(batch.tokens[0], made.ids)
        np.testing.assert_array_equal(batch.visual_index[0] >= 0, made.visual)
        found[f"conv.{entry['name']}"] = made
    for entry in listed["prompts"]:
        pictures = [inputs[f"image.{number}"] for number in entry["images"]]
        if entry["apply_sft_format"]:
            pieces = prompt([{"role": "user", "content": entry["prompt"]}], ())
        else:
            begin, *_ = prompt([{"role": "user", "content": ""}], ())
            pieces = [begin, *prompt.spelled(entry["prompt"])]
        found[f"prompt.{entry['name']}"] = Official(processor, pieces, pictures, inference=True)
    return found


def padded(rows: list[np.ndarray], fill: int | bool, side: str) -> np.ndarray:
    length = max(map(len, rows))
    width = {"left": lambda row: (length - len(row), 0), "right": lambda row: (0, length - len(row))}[side]
    return np.stack([np.pad(row, width(row), constant_values=fill) for row in rows])


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the manifest."""
    golden = comparison.read(folder)
    processor = deepseek.processor2(folder, {})
    views, found = processor.views, {}
    for name, array in inputs.items():
        picture = Image.fromarray(array)
        tiles = views.tiles(picture, 1)
        found[f"{name}.tiles_u8"] = np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])
        found[f"{name}.crop"] = np.array(views.grid(array.shape[:2], 1)[::-1])
        found[f"{name}.num_tokens"] = np.array(processor.count_visual_tokens([array.shape[:2]])[0])
        found["pixels.0"] = views.images([picture])[0].pixels[:1].transpose(0, 3, 1, 2)
    made = conversations(processor, inputs, json.loads((folder / "conversations.json").read_text()))
    for name, official in made.items():
        arrays = official.arrays()
        arrays["labels"] = arrays["labels_mask_prompt0"]
        found |= {f"{name}.{key}": array for key, array in arrays.items()}
    for side in ("left", "right"):
        meaning = golden.entries[f"batchify.{side}.input_ids"]["meaning"]
        rows = [made[name].arrays() for name in meaning.removeprefix("batch of ").split(", ")]
        fills = {"input_ids": processor.pad_id, "labels_mask_prompt0": IGNORED, "images_seq_mask": False}
        stacked = {key: padded([row[key] for row in rows], fill, side) for key, fill in fills.items()}
        stacked["labels"] = stacked["labels_mask_prompt0"]
        stacked["attention_mask"] = padded([np.ones(len(row["input_ids"]), bool) for row in rows], False, side)
        most = max(len(row["images_spatial_crop"]) for row in rows)
        crops = [
            np.pad(row["images_spatial_crop"], ((0, most - len(row["images_spatial_crop"])), (0, 0))) for row in rows
        ]
        stacked["images_spatial_crop"] = np.stack(crops)
        stacked["seq_lens"] = np.array([len(row["input_ids"]) for row in rows])
        seen = [made[name].seen for name in meaning.removeprefix("batch of ").split(", ")]
        tiles = views.join(seen, max(1, *(sum(len(one.pixels) for one in row) for row in seen)))  # a blank one for none
        stacked["images_shape"] = np.array([tiles.shape[i] for i in (0, 1, 4, 2, 3)])
        found |= {f"batchify.{side}.{key}": array for key, array in stacked.items()}
    return {name: array for name, array in found.items() if name in golden.expected}
