"""JPEG files per second of a core: Pillow's decoder, that of simplejpeg, and what follows both.

    pip install simplejpeg
    python experiments/processor_speed/decoders.py --rounds 30

Contenders alternate within a round; times are of the processor, which other load on the machine changes little.
"""

import argparse
import io
import json
import statistics
import time

import numpy as np
import simplejpeg
from benchmark import contenders, pictures
from PIL import Image


def encoded(count: int, height: int, width: int) -> list[bytes]:
    """JPEG files, the same in every run."""
    files = []
    for picture in pictures(count, height, width):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, nargs=2, default=(768, 1024), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    files = encoded(arguments.pictures, *arguments.size)
    given = [Image.fromarray(by_pillow(one)) for one in files]
    for data in files:
        np.testing.assert_array_equal(by_pillow(data), by_simplejpeg(data))
    parts = {"Pillow": (by_pillow, files), "simplejpeg": (by_simplejpeg, files)}
    parts |= {f"{name}, decoded": (one["ours"], given) for name, one in contenders().items()}
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(arguments.rounds):
        for name, (run, inputs) in parts.items():
            start = time.process_time()
            for one in inputs:
                run(one)
            rates[name].append(len(inputs) / (time.process_time() - start))
    print(json.dumps({name: round(statistics.median(values), 1) for name, values in rates.items()}))


if __name__ == "__main__":
    main()
