"""big_vision's image operations: plain and antialiased resizes, sizes for a sequence, NaFlex patches."""

import pathlib
import re

import numpy as np
from PIL import Image

from tests.golden import comparison
from vlm_jax.pretrained.processing.image_text import HALF
from vlm_jax.processors.image_text import NaflexInputs, TensorFlowInputs
from vlm_jax.processors.naflex import size_for_sequence


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder; patch sizes and sequence lengths are taken from the manifest's meanings."""
    golden = comparison.read(folder)
    found = {}
    for name, image in inputs.items():
        stem = name.removesuffix("_u8")
        if stem.startswith("naf"):
            meaning = golden.entries[f"{stem}_resized"]["meaning"]
            patch, longest = map(int, re.search(r"patch (\d+), max (\d+)", meaning).groups())
            packed = NaflexInputs(HALF, patch, longest, floats=True)([Image.fromarray(image)])
            real = packed.segment_ids[0] > 0
            rows, cols = packed.sizes[0, 0]
            patches = packed.patches[0][real]
            blocks = patches.reshape(rows, cols, patch, patch, 3).swapaxes(1, 2)
            found |= {f"{stem}_resized": blocks.reshape(rows * patch, cols * patch, 3), f"{stem}_patches": patches}
            found[f"{stem}_yx"] = packed.positions[0][real].T
        else:
            for ending, kind in (("plain", "bilinear"), ("aa", "bilinear_antialias")):
                size = golden.expected[f"{stem}_{ending}"].shape[:2]
                (scaled,) = TensorFlowInputs(size, kind)([Image.fromarray(image)])
                found[f"{stem}_{ending}"] = np.rint((scaled + 1) * 127.5).astype(np.uint8)
    asked = golden.expected["size_table"][:, :4]
    answers = [size_for_sequence(*row) for row in asked.tolist()]
    found["size_table"] = np.concatenate([asked, [size for _, size in answers]], axis=1)
    found["size_ratio"] = np.asarray([ratio for ratio, _ in answers], np.float32)
    return found
