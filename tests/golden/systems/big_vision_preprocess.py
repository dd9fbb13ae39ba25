"""big_vision's image operations: plain and antialiased resizes, sizes for a sequence, NaFlex patches."""

import pathlib
import re

import numpy as np

from tests.golden import comparison
from vlm_jax.processors.naflex import interpolate, size_for_sequence
from vlm_jax.processors.patches import pack, patchify


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder; patch sizes and sequence lengths are told by the manifest's meanings."""
    golden = comparison.read(folder)
    found = {}
    for name, image in inputs.items():
        stem = name.removesuffix("_u8")
        if stem.startswith("naf"):
            meaning = golden.entries[f"{stem}_resized"]["meaning"]
            patch, longest = map(int, re.search(r"patch (\d+), max (\d+)", meaning).groups())
            scaled = image.astype(np.float32) / 255 * 2 - 1
            resized = interpolate(scaled, size_for_sequence(*image.shape[:2], patch, longest)[1], "bilinear_antialias")
            patches, grid = patchify(resized[None], patch_size=patch, channels_last=True)
            found |= {f"{stem}_resized": resized, f"{stem}_patches": patches}
            found[f"{stem}_yx"] = pack(patches, [grid]).positions[0].T
        else:
            for ending, kind in (("plain", "bilinear"), ("aa", "bilinear_antialias")):
                size = golden.expected[f"{stem}_{ending}"].shape[:2]
                found[f"{stem}_{ending}"] = interpolate(image, size, kind)
    asked = golden.expected["size_table"][:, :4]
    answers = [size_for_sequence(*row) for row in asked.tolist()]
    found["size_table"] = np.concatenate([asked, [size for _, size in answers]], axis=1)
    found["size_ratio"] = np.asarray([ratio for ratio, _ in answers], np.float32)
    return found
