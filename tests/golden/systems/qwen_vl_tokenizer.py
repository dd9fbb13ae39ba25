"""Qwen-VL's tokenizer: its bytes, its special tokens, and texts there and back.

The rows of `cases.json` are next to the arrays; one that does not hold is an error of the module.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlm_jax.pretrained.processing.qwen import NUM_QUERIES
from vlm_jax.processors.boxes import SCALE
from vlm_jax.processors.grounding import answer_boxes
from vlm_jax.processors.list_format import PICTURE, from_list_format, to_list_format
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.spelled_prompt import QwenVLPrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer

IMAGE = "<img>"

# Roles of cases.json -> names of the release.
SPECIAL = {
    "eod_id": "<|endoftext|>",
    "im_start_id": "<|im_start|>",
    "im_end_id": "<|im_end|>",
    "img_pad_id": "<imgpad>",
    **{f"{tag}_start_id": f"<{tag}>" for tag in ("img", "ref", "box", "quad")},
    **{f"{tag}_end_id": f"</{tag}>" for tag in ("img", "ref", "box", "quad")},
}

# Functions of the release that the rows call, and nothing here does.
NOT_COMPARED_ROWS = {
    "_fetch_latest_picture": "finds the picture to draw boxes on, which is given to the function that draws here",
    "make_context": "with max_window_size: leaves out old turns, where nothing is cut here",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The byte of every of the first ranks."""
    tokenizer = Tokenizer.from_folder(folder)
    cases = json.loads((folder / "cases.json").read_text())
    wrong = [f"{role}: {cases['special_ids'][role]}" for role in cases["special_ids"] if
             tokenizer.id_of(SPECIAL[role]) != cases["special_ids"][role]]  # fmt: skip
    if tokenizer.vocab_size != cases["n_vocab"]:
        wrong.append(f"n_vocab: {tokenizer.vocab_size}")
    # A span of an image holds the bytes of a path, which the system's processor writes; see below.
    texts = [row for row in cases["rows"] if row["fn"] == "encode+decode" and IMAGE not in row["input"]]
    for row in texts:
        ids = tokenizer.encode(row["input"])
        found = (ids, tokenizer.decode(ids, skip_special=False), tokenizer.decode(ids))
        if found != (row["ids"], row["decoded"], row["decoded_skip_special"]):
            wrong.append(f"{row['input']!r}: {found}")
    wrong += [f"{row['fn']} of {row['input']!r}: {found}" for row, found in _processed(tokenizer, cases["rows"])]
    if wrong or not texts:
        raise AssertionError(f"{folder}/cases.json: rows that do not hold: {wrong}, of {len(texts)}")
    ranks = [tokenizer.vocabulary.token_bytes(index) for index in range(256)]
    return {"first256_bytes": np.frombuffer(b"".join(ranks), np.uint8)}


def _processed(tokenizer: Tokenizer, rows: list[dict]) -> list[tuple[dict, Any]]:
    """Rows of lists, boxes and conversations that do not hold, with what is found."""
    processor = Processor(QwenVLPrompt(tokenizer), SquareViews(Pixels(), (1, 1), NUM_QUERIES), tokenizer, 0)
    wrong = []
    for row in rows:
        match row["fn"].split(" (")[0].split("(")[0]:
            case "from_list_format":
                picture = PICTURE.rstrip() if "without space" in row["fn"] else PICTURE
                found, expected = from_list_format(row["input"], picture), row["output"]
            case "to_list_format":
                found, expected = to_list_format(row["input"]), row["output"]
            case "to_list_format error":
                found, expected = _refused(to_list_format, row["input"]), True
            case "_fetch_all_box_with_ref":
                found = [
                    {"box": list(found.box), **({} if found.name is None else {"ref": found.name})}
                    for found in answer_boxes(row["input"], (SCALE, SCALE))
                ]
                expected = row["output"]
            case "encode+decode" if IMAGE in row["input"]:
                found, expected = _ids(processor, row["input"]), row["ids"]
            case "encode error":
                found, expected = _refused(functools.partial(_ids, processor), row["input"]), True
            case "make_context" if "(raw)" in row["fn"]:
                found, expected = _ids(processor, row["input"]["query"]), row["ids"]
            case "make_context" if "max_window_size" not in row["input"]:
                given = row["input"]
                turns = [*(given["history"] or []), [given["query"]]]
                messages = [{"role": "system", "content": given["system"]}]
                messages += [
                    {"role": role, "content": text}
                    for turn in turns
                    for role, text in zip(("user", "assistant"), turn, strict=False)
                ]
                images = [np.zeros((1, 1, 3), np.uint8)] * str(messages).count(IMAGE)
                found, expected = processor(messages, images).tokens[0].tolist(), row["ids"]
            case "encode+decode":
                continue  # compared by the caller
            case function if function in NOT_COMPARED_ROWS:
                continue
            case function:
                found, expected = f"nothing computes {function}", row.get("output")
        if found != expected:
            wrong.append((row, found))
    return wrong


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A prompt that gives its pieces for any messages."""

    pieces: list
    independent_turns = False
    placeholders: ClassVar = {}

    def __call__(self, *args: Any, **options: Any) -> list:
        del args, options
        return self.pieces


def _ids(processor: Processor, text: str) -> list[int]:
    """Ids of a text by way of the public call."""
    pieces = processor.prompt.spelled(text)
    fixed = dataclasses.replace(processor, prompt=_Fixed(pieces))
    images = [np.zeros((1, 1, 3), np.uint8)] * sum(isinstance(piece, Slot) for piece in pieces)
    return fixed([{"role": "user", "content": ""}], images).tokens[0].tolist()


def _refused(function: Callable[[str], Any], text: str) -> bool:
    try:
        function(text)
    except ValueError:
        return True
    return False
