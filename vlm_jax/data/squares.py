"""Pictures of one coloured square with questions about it, as a file of conversations in LLaVA's format.

For trying the commands without data of one's own: a picture has a square in one of 4 x 4 places, and a question asks
for its colour or its place. The answer about the place is a box in the format of Qwen-VL.
"""

import json
import os
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw

SIDE, PLACES = 64, 4  # pixels of a picture, and rows and columns of places
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (130, 60, 180),
    "black": (20, 20, 20),
}
COLOUR, PLACE = "Which colour is the square?", "Where is the square?"


def draw_square(colour: str, row: int, column: int, *, seed: int = 0) -> Image.Image:
    """A picture of 64 x 64 pixels: a square of 16 pixels on a light, noisy ground.

    Args:
      colour: one of `COLOURS`.
      row, column: its place, 0 to 3.
      seed: of the noise.
    """
    noise = np.random.default_rng(seed).integers(205, 246, (SIDE // 4, SIDE // 4, 3), np.uint8)
    picture = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    size = SIDE // PLACES
    corner = (column * size, row * size, (column + 1) * size - 1, (row + 1) * size - 1)
    ImageDraw.Draw(picture).rectangle(corner, fill=COLOURS[colour])
    return picture


def square_box(row: int, column: int) -> str:
    """The answer about a place: corners in thousandths of the picture, as Qwen-VL writes them."""
    step = 1000 // PLACES
    left, top = column * step, row * step
    return f"<box>({left},{top}),({left + step},{top + step})</box>"


def write_squares(folder: str | os.PathLike[str], count: int, *, seed: int = 0, name: str = "squares") -> pathlib.Path:
    """Draws pictures and writes their questions; each picture has one, in turn about the colour and the place.

    Args:
      folder: created if missing.
      count: number of pictures.
      seed: of colours, places and noise.
      name: of the file and of the folder of the pictures.

    Returns:
      `folder/name.json`, a list of records in LLaVA's format with the tasks `colour` and `place`.
    """
    folder, rng, records = pathlib.Path(folder), random.Random(seed), []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour, row, column = rng.choice(list(COLOURS)), rng.randrange(PLACES), rng.randrange(PLACES)
        path = f"{name}/{number}.png"
        draw_square(colour, row, column, seed=rng.randrange(2**32)).save(folder / path)
        asked = number % 2 == 0
        question, answer = (COLOUR, colour) if asked else (PLACE, square_box(row, column))
        said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        task = "colour" if asked else "place"
        records.append({"id": str(number), "image": path, "task": task, "conversations": said})
    file = folder / f"{name}.json"
    file.write_text(json.dumps(records, indent=1))
    return file
