"""The prompts of the Ovis folders: images as patches or crops, and ids with the released codes' negative ones."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from tests.golden.comparison import Golden
from vlm_jax.pretrained.processing import ovis
from vlm_jax.processors.processor import Processor
from vlm_jax.types import Batch

ATOM, IGNORED = -300, -100  # indicators are -301, -302, ...
THINK = "<think>\n\n</think>\n\n"
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)


def pictures(golden: Golden) -> list[Image.Image]:
    """The images of the folder, by their numbers."""
    named = {int(name.split(".")[1]): x for name, x in golden.inputs.items() if re.fullmatch(r"img\.\d+\.u8", name)}
    return [Image.fromarray(named[number]) for number in sorted(named)]


def outputs2(golden: Golden, config: dict) -> dict[str, np.ndarray]:
    """Ovis 2: the crops of all images, and one atom a crop among the indicators of an image."""
    images = pictures(golden)
    if not images:
        return {}
    most = int(re.search(r"max_partition=(\d+)", golden.entries["pixel_values"]["meaning"]).group(1))
    views = dataclasses.replace(ovis.processor2(golden.folder, config).views, max_parts=most)
    crops = np.concatenate([seen.pixels for seen in views.images(images)])
    found = {"pixel_values": crops.transpose(0, 3, 1, 2)}
    one = dataclasses.replace(views, num_tokens=1)
    for number, layout in enumerate(one.layouts([(image.height, image.width) for image in images])):
        found[f"img.{number}.placeholders"] = np.where(layout < 0, ATOM + layout, ATOM)
    return found


def ids(batch: Batch) -> np.ndarray:
    """The released ids of a batch of Ovis 2.5, in which learned rows and atoms are negative."""
    learned = ATOM - 1 - batch.visual_index
    visual = np.where(batch.visual_index < ovis.NUM_INDICATORS_2_5, learned, ATOM)
    return np.where(batch.visual_index < 0, batch.tokens, visual).astype(np.int64)


def outputs2_5(golden: Golden, config: dict) -> dict[str, Any]:
    """Ovis 2.5: patches and grids, rendered prompts, and ids."""
    inputs, images = golden.inputs, pictures(golden)
    processor = ovis.processor2_5(golden.folder, config)

    def limited(name: str) -> Processor:
        least, most = inputs[name].tolist()
        return dataclasses.replace(
            processor, views=dataclasses.replace(processor.views, min_pixels=least, max_pixels=most)
        )

    ours = limited("img.min_max_pixels")
    seen = ours.views.images(images)
    found: dict[str, Any] = {
        "vit.pixel_values": np.concatenate([one.pixels for one in seen]),
        "vit.grid_thws": np.array([one.grid for one in seen]),
        "mm.grid_thws": np.array([seen[0].grid]),
    }
    for name, given in {"mm": images[:1], "mm2": images, "chat": images[1:2]}.items():
        key = f"{name}.rendered_prompt" if name != "chat" else "chat.prompt"
        # The answers are only in the official text.
        text = str(golden.expected[key])
        thinking = {"enable_thinking": not text.endswith(THINK)}
        found[key] = np.array(ours.prompt.template.render(messages(text), **thinking))
        found[f"{name}.input_ids"] = ids(ours(messages(text), given, **thinking))
    # The second row has random ids, without a text.
    rows = [found["mm.input_ids"][0], golden.expected["text.input_ids"][0]]
    found["batch.input_ids"] = np.full((2, max(map(len, rows))), ours.pad_id)
    for row, given in zip(found["batch.input_ids"], rows, strict=True):
        row[: len(given)] = given
    return found | _video(golden, limited("video.min_max_pixels")) | _trained(golden, ours, images)


def messages(text: str) -> list[dict]:
    """The turns of a rendered prompt, whose tags are in it."""
    return [{"role": role, "content": content} for role, content in _TURN.findall(text)]


def _video(golden: Golden, ours: Processor) -> dict[str, Any]:
    frames = list(golden.inputs["video.frames_u8"])
    (seen,) = ours.views.video([Image.fromarray(frame) for frame in frames], None)
    pieces = np.split(theirs := golden.expected["video.input_ids"][0], np.nonzero(np.diff(theirs >= 0))[0] + 1)
    decode = ours.prompt.tokenizer.decode
    text = "".join("<video>" if piece[0] < 0 else decode(piece, skip_special=False) for piece in pieces)
    return {
        "video.pixel_values": seen.pixels,
        "video.grid_thws": np.array([seen.grid]),
        "video.input_ids": ids(ours(messages(text), videos=[frames], enable_thinking=False)),
    }


def _trained(golden: Golden, ours: Processor, images: list[Image.Image]) -> dict[str, Any]:
    """The conversation of fine-tuning, and what is learned of it; without the last newline."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = json.loads(str(golden.inputs["sft.conversation"]))
    said = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    batch = ours(said, images[:1], targets=True)
    labels = np.full(batch.tokens.shape, IGNORED, np.int64)
    labels[:, 1:] = np.where(batch.loss_weights, batch.targets, IGNORED)[:, :-1]
    return {
        "sft.prompt": np.array(ours.prompt.training.render(said, add_generation_prompt=False)),
        "sft.input_ids": ids(batch)[:, :-1],
        "sft.labels": labels[:, :-1],
    }
