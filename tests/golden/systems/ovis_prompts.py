"""The prompts of the Ovis folders: images as patches or crops, and ids with the released codes' negative ones."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from tests.golden import comparison
from tests.golden.comparison import Golden
from vlm_jax.pretrained.processing import ovis
from vlm_jax.processors.processor import Processor
from vlm_jax.types import Batch

ATOM, IGNORED = -300, -100  # indicators are -301, -302, ...
HEAD = "<|im_start|>assistant\n"
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
    grids = np.array([one.grid for one in seen])
    found: dict[str, Any] = {"vit.pixel_values": np.concatenate([one.pixels for one in seen]), "vit.grid_thws": grids}
    for key in golden.expected:
        if not (match := re.fullmatch(r"(\w+)\.(rendered_prompt|prompt)", key)) or f"{match[1]}.conversation" in inputs:
            continue
        # What was said stands in the official text alone.
        text = str(golden.expected[key])
        said, options = messages(text), ending(text)
        shown = shown_pictures(golden, match[1], text.count("<image>"))
        found[key] = np.array(ours.prompt.template.render(said, **options))
        found[f"{match[1]}.input_ids"] = ids(ours(said, [images[number] for number in shown], **options))
        found[f"{match[1]}.grid_thws"] = grids[shown]
    # Prompts with ids drawn at random have no text: theirs are taken as they are.
    rows = [{**golden.expected, **found}[f"{name}.input_ids"][0] for name in batched(golden)]
    found["batch.input_ids"] = np.full((len(rows), golden.expected["batch.input_ids"].shape[1]), ours.pad_id)
    for row, given in zip(found["batch.input_ids"], rows, strict=True):
        row[: len(given)] = given
    return found | _video(golden, limited("video.min_max_pixels")) | _trained(golden, ours, images)


def batched(golden: Golden) -> list[str]:
    """The prompts of the folder's batch, row by row: `right padded batch (mm prompt, text prompt)`."""
    return re.findall(r"(\w+) prompt\b", golden.entries["batch.input_ids"]["meaning"])


def shown_pictures(golden: Golden, name: str, count: int) -> list[int]:
    """The numbers of the images that a prompt shows: those that the manifest names beside it, else the first ones."""
    entries = [entry for key, entry in golden.entries.items() if key.startswith(f"{name}.")]
    named = dict.fromkeys(number for entry in entries for number in comparison.named_pictures(entry["meaning"]))
    return [*named, *(number for number in range(count) if number not in named)][:count]


def messages(text: str) -> list[dict]:
    """The turns of a rendered prompt, whose tags are in it."""
    return [{"role": role, "content": content} for role, content in _TURN.findall(text)]


def ending(text: str) -> dict[str, bool]:
    """The options under which a prompt was rendered, by what stands behind its last turn.

    Raises:
      ValueError: more than the head of an answer and an empty thought stand there.
    """
    rest = _TURN.sub("", text)
    if rest not in ("", HEAD, HEAD + THINK):
        raise ValueError(f"a prompt with {rest!r} behind its turns")
    return {"add_generation_prompt": bool(rest), "enable_thinking": not rest.endswith(THINK)}


def _video(golden: Golden, ours: Processor) -> dict[str, Any]:
    frames = list(golden.inputs["video.frames_u8"])
    (seen,) = ours.views.video([Image.fromarray(frame) for frame in frames], None)
    pieces = np.split(theirs := golden.expected["video.input_ids"][0], np.nonzero(np.diff(theirs >= 0))[0] + 1)
    decode = ours.prompt.tokenizer.decode
    text = "".join("<video>" if piece[0] < 0 else decode(piece, skip_special=False) for piece in pieces)
    return {
        "video.pixel_values": seen.pixels,
        "video.grid_thws": np.array([seen.grid]),
        "video.input_ids": ids(ours(messages(text), videos=[frames], **ending(text))),
    }


def _trained(golden: Golden, ours: Processor, images: list[Image.Image]) -> dict[str, Any]:
    """The conversation of fine-tuning, and what is learned of it."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = json.loads(str(golden.inputs["sft.conversation"]))
    said = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    shown = shown_pictures(golden, "sft", str(turns).count("<image>"))
    batch = ours(said, [images[number] for number in shown], targets=True)
    labels = np.full(batch.tokens.shape, IGNORED, np.int64)
    labels[:, 1:] = np.where(batch.loss_weights, batch.targets, IGNORED)[:, :-1]
    return {
        "sft.prompt": np.array(ours.prompt.training.render(said, add_generation_prompt=False)),
        "sft.input_ids": ids(batch),
        "sft.labels": labels,
    }
