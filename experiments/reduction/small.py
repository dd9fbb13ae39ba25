"""Small folders of the four systems, with random weights, and questions whose references are their own answers.

They show that the whole table runs: what is retained of a random model's answers says how often a method changes them.
"""

import json
import pathlib
import sys

import numpy as np
import safetensors.numpy

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

import vlm_jax
from tests.contracts.releases import make
from vlm_jax.data.squares import COLOURS, draw_square

SYSTEMS = ("llava", "llava_next", "qwen2_5_vl", "internvl")
TASK, METRIC = "own", "characters"  # an answer without an end counts as far as it was written
LONGEST = 5  # tokens of an answer; a reference has one less, and its end token
PRINTABLE = 94  # the first ids of the small folders' tokenizer are the characters of ASCII


def write_system(name: str, folder: pathlib.Path, questions: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a small folder of a system, and pictures with one question each; what is there already is kept.

    Args:
      name: one of `SYSTEMS`.
      folder: created if missing.
      questions: number of pictures.

    Returns:
      The folder of the release, and the file of questions, which is of this system alone.
    """
    release, asked = folder / name, folder / f"{name}_{questions}.jsonl"
    if asked.exists():
        return release, asked
    release.mkdir(parents=True, exist_ok=True)
    make(name, release)
    (weights,) = release.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    (head,) = (key for key in tensors if key.endswith("lm_head.weight"))
    tensors[head][PRINTABLE:] = 0  # so that it says nothing but characters
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    model, colours = vlm_jax.from_pretrained(release), tuple(COLOURS)
    pictures = [draw_square(colours[i % 6], i % 4, i // 4 % 4, seed=i) for i in range(questions)]
    items = [[{"type": "image"}, {"type": "text", "text": f"{i}?"}] for i in range(questions)]
    answers = model.system.answer(
        model.params,
        [[{"role": "user", "content": content}] for content in items],
        [(np.asarray(picture),) for picture in pictures],
        [()] * questions,
        max_new_tokens=LONGEST,
        names=[f"picture {i}" for i in range(questions)],
    )
    lines = []
    for i, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
        picture.save(folder / f"{i}.png")
        turns = [[f"{i}?", answer.text[: LONGEST - 1]]]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "task": TASK, "turns": turns}) + "\n")
    asked.write_text("".join(lines))
    return release, asked
