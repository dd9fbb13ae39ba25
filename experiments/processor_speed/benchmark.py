"""Images per second of our processors and of those of transformers, on one thread.

    python experiments/processor_speed/benchmark.py --rounds 7

Both get the same decoded Pillow images, and return float32 arrays for the encoder. Contenders
alternate within a round, so that other load on the machine affects all of them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and PyTorch start
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_jax.processors.image import to_picture
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.views import Views
from vlm_jax.types import PatchFormat

Contender = Callable[[Image.Image], np.ndarray]


def pictures(count: int, height: int, width: int) -> list[Image.Image]:
    """Smooth noise, the same in every run."""
    draw = np.random.default_rng(0)
    small = draw.integers(0, 255, (count, height // 8, width // 8, 3), np.uint8)
    return [Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC) for noise in small]


def ours(views: Views) -> Contender:
    """Preprocesses one Pillow image with views."""
    return lambda picture: views.images([to_picture(picture)])[0].pixels


def contenders() -> dict[str, dict[str, Contender]]:
    """By system: ours, theirs, and only Pillow's resize, a lower bound for both."""
    qwen, siglip = Qwen2VLImageProcessorPil(), SiglipImageProcessorPil()
    limits = (qwen.size["shortest_edge"], qwen.size["longest_edge"])
    statistics_of = [
        Pixels(tuple(one.image_mean), tuple(one.image_std), Image.Resampling(one.resample)) for one in (qwen, siglip)
    ]
    native = NativeViews(statistics_of[0], PatchFormat(14, 2, 2), qwen_size, *limits)
    side = siglip.size["height"]

    def resized(size: Callable[[Image.Image], tuple[int, int]]) -> Contender:
        return lambda picture: np.asarray(picture.resize(size(picture)[::-1], Image.Resampling.BICUBIC))

    return {
        "Qwen2-VL": {
            "ours": ours(native),
            "transformers": lambda picture: np.asarray(qwen(picture)["pixel_values"]),
            "Pillow's resize": resized(lambda picture: native.size((picture.height, picture.width))),
        },
        "SigLIP": {
            "ours": ours(SquareViews(statistics_of[1], (side, side), 1, "stretch")),
            "transformers": lambda picture: np.moveaxis(np.asarray(siglip(picture)["pixel_values"]), 1, -1),
            "Pillow's resize": resized(lambda picture: (side, side)),
        },
    }


def measured(system: dict[str, Contender], given: list[Image.Image], rounds: int) -> dict[str, float]:
    """Images per second of every contender: the median of the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in system}
    for contender in system.values():
        contender(given[0])
    for _ in range(rounds):
        for name, contender in system.items():
            start = time.perf_counter()
            for picture in given:
                contender(picture)
            rates[name].append(len(given) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, default=(768, 1024), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    given = pictures(arguments.pictures, *arguments.size)
    for name, system in contenders().items():
        error = max(float(np.abs(system["ours"](one) - system["transformers"](one)).max()) for one in given)
        rates = measured(system, given, arguments.rounds)
        ratio = rates["ours"] / rates["transformers"]
        print(json.dumps({"system": name, **{key: round(rate, 1) for key, rate in rates.items()},
                          "ratio": round(ratio, 2), "largest difference": error}))  # fmt: skip


if __name__ == "__main__":
    main()
