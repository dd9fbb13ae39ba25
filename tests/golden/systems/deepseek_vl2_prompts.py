"""The prompts of the DeepSeek-VL2 folders, as the model is given them: ids, masks, tiles, labels and positions."""

import re

import numpy as np
from PIL import Image

from tests.golden.comparison import Golden
from tests.golden.systems.deepseek_vl2_processor import Official
from vlm_jax.checkpoints.hub import read_config
from vlm_jax.pretrained.processing import deepseek
from vlm_jax.processors.layout import Text
from vlm_jax.processors.processor import Processor


def pictures(golden: Golden, *prefixes: str) -> list[np.ndarray]:
    """The images of the prompts so named, by their numbers."""
    named = {
        int(found.group(1)): array
        for prefix in prefixes
        for name, array in golden.inputs.items()
        if (found := re.fullmatch(rf"{prefix}\.image\.(\d+)", name))
    }
    return [named[number] for number in sorted(named)]


def say(*texts: str) -> list[dict]:
    """Turns of a user and an assistant."""
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


def outputs(golden: Golden) -> dict[str, np.ndarray]:
    """The arrays of `mm`, `sft` and `batch` that the official processor makes."""
    processor = deepseek.processor2(golden.folder, read_config(golden.folder))
    found: dict[str, np.ndarray] = {}
    conversations = said(golden)
    for name in ("mm", "sft"):
        messages, images = conversations[name]
        pieces = processor.prompt(messages, (), targets=True)
        made = Official(processor, pieces, images, inference=name != "sft")
        arrays = made.arrays()
        tiles = processor.views.join([made.seen], max(sum(len(seen.pixels) for seen in made.seen), 1))
        found |= {f"{name}.{key}": array[None] for key, array in arrays.items()}
        found[f"{name}.labels"] = arrays["labels_mask_prompt1"][None]
        found[f"{name}.images"] = tiles.transpose(0, 1, 4, 2, 3)
        found[f"{name}.sft_format"] = np.array(displayed(processor, messages))
    return found | _batch(processor, [conversations[name] for name in conversations if name.startswith("batch.")])


def said(golden: Golden) -> dict[str, tuple[list[dict], list[np.ndarray]]]:
    """The folder's conversations and their images: as many as there are tags, from the first one on."""
    inputs = golden.inputs
    found = {
        "mm": (say(str(inputs["mm.prompt"])), pictures(golden, "mm")),
        "sft": (say(str(inputs["sft.user"]), str(inputs["sft.assistant"])), pictures(golden, "sft")),
    }
    stock = pictures(golden, "mm", "batch")
    for number in sorted(int(name.rpartition(".")[2]) for name in inputs if name.startswith("batch.prompt.")):
        found[f"batch.{number}"] = (say(str(inputs[f"batch.prompt.{number}"])), stock)
    return {name: (turns, images[: str(turns).count("<image>")]) for name, (turns, images) in found.items()}


def displayed(processor: Processor, messages: list[dict]) -> str:
    """The text of a prompt, which the release shows next to it, of one question."""
    _, *pieces = processor.prompt(messages, ())
    tokenizer = processor.prompt.tokenizer
    parts = [tokenizer.decode(p.ids, skip_special=False) if isinstance(p, Text) else "<image>" for p in pieces]
    return "".join(parts)


def _batch(processor: Processor, said: list[tuple[list[dict], list[np.ndarray]]]) -> dict[str, np.ndarray]:
    images = [[Image.fromarray(image) for image in row] for _, row in said]
    batch = processor.batch([messages for messages, _ in said], images)
    sizes = [[(image.height, image.width) for image in row] for row in images]
    crops = [[processor.views.grid(size, len(row))[::-1] for size in row] for row in sizes]
    most = max(1, *map(len, crops))
    return {
        "batch.input_ids": batch.tokens,
        "batch.attention_mask": batch.segment_ids > 0,
        "batch.images_seq_mask": batch.visual_index >= 0,
        "batch.images_spatial_crop": np.array([[*row, *[(0, 0)] * (most - len(row))] for row in crops]),
        "batch.num_tiles": np.array([sum(len(seen.pixels) for seen in processor.views.images(row)) for row in images]),
        "batch.position_ids": np.where(batch.segment_ids > 0, batch.positions, 1),
    }
