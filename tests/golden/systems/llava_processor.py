"""What the image processors of LLaVA and MobileVLM make of images, and how prompts are padded into a batch."""

import itertools
import json

import numpy as np
from PIL import Image

from tests.golden import comparison
from tests.golden.comparison import Golden
from vlm_jax.pretrained.processing import llava
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.layout import Text, Visual, lay_out

PLACEHOLDER, IGNORED = -200, -100  # IMAGE_TOKEN_INDEX and IGNORE_INDEX of the release


def outputs(golden: Golden) -> dict[str, np.ndarray]:
    """`pixel_values`, `img<i>_pixel_values`, `pre<i>_pad`, and the masks, positions and labels of `batch`."""
    config, tower = (
        json.loads((golden.folder / name).read_text()) for name in ("config.json", "vision_tower_config.json")
    )
    views, found = llava.views(golden.folder, {**config, "vision_tower_config": tower}), {}
    for name, array in golden.inputs.items():
        picture = Image.fromarray(array) if name.endswith("_u8") and array.ndim == 3 else None
        if picture is None:
            continue
        stem = name.removesuffix("_u8")
        if isinstance(views, AnyresViews):
            tiles = np.stack([np.asarray(tile) for tile in views.tiles(picture)])
            found[f"{stem}_pixel_values"] = tiles.transpose(0, 3, 1, 2)
        else:
            (seen,) = views.images([picture])
            pixels = seen.pixels.transpose(0, 3, 1, 2)
            found |= {"pixel_values": pixels, f"{stem}_pad": pixels[0]}
    if "batch_right_mask" in golden.expected:
        found |= _batch(golden, views)
    return {name: array for name, array in found.items() if name in golden.expected}


def _batch(golden: Golden, views: AnyresViews) -> dict[str, np.ndarray]:
    inputs, found = golden.inputs, {}
    kept = inputs["batch_mask"] > 0
    counts = [int((ids[mask] == PLACEHOLDER).sum()) for ids, mask in zip(inputs["batch_ids"], kept, strict=True)]
    images = comparison.pictures(golden.entries["batch_ids"], counts)
    for side in ("right", "left"):
        numbers = iter(itertools.chain(*images))
        rows = []
        for ids, labels, mask in zip(inputs["batch_ids"], inputs["batch_labels"], kept, strict=True):
            pieces, answers = [], []
            for token, label in zip(ids[mask].tolist(), labels[mask].tolist(), strict=True):
                if token == PLACEHOLDER:
                    (layout,) = views.layouts([inputs[f"img{next(numbers)}_u8"].shape[:2]])
                    pieces.append(Visual(layout, np.zeros(len(layout), np.int32)))
                    answers.append(Text([IGNORED] * len(layout)))
                else:
                    pieces.append(Text([token]))
                    answers.append(Text([label]))
            rows.append((pieces, answers))
        length = max(sum(len(p.ids if isinstance(p, Text) else p.rows) for p in pieces) for pieces, _ in rows)
        laid = [[lay_out([part], length, pad_id=IGNORED, pad_side=side) for part in row] for row in rows]
        found[f"batch_{side}_mask"] = np.concatenate([row.segment_ids for row, _ in laid])
        found[f"batch_{side}_position_ids"] = np.concatenate([row.positions for row, _ in laid])
        found[f"batch_{side}_labels"] = np.concatenate([row.tokens for _, row in laid])
    return found
