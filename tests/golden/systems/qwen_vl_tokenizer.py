"""Qwen-VL's tokenizer: its bytes, its special tokens, and texts there and back.

The rows of `cases.json` stand beside the arrays; one that does not hold is an error of the module.
"""

import json
from pathlib import Path

import numpy as np

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


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The byte of every of the first ranks."""
    tokenizer = Tokenizer.from_folder(folder)
    cases = json.loads((folder / "cases.json").read_text())
    wrong = [f"{role}: {cases['special_ids'][role]}" for role in cases["special_ids"] if
             tokenizer.id_of(SPECIAL[role]) != cases["special_ids"][role]]  # fmt: skip
    if tokenizer.vocab_size != cases["n_vocab"]:
        wrong.append(f"n_vocab: {tokenizer.vocab_size}")
    # A span of an image holds the bytes of a path, which the system's processor writes.
    texts = [row for row in cases["rows"] if row["fn"] == "encode+decode" and IMAGE not in row["input"]]
    for row in texts:
        ids = tokenizer.encode(row["input"])
        found = (ids, tokenizer.decode(ids, skip_special=False), tokenizer.decode(ids))
        if found != (row["ids"], row["decoded"], row["decoded_skip_special"]):
            wrong.append(f"{row['input']!r}: {found}")
    if wrong or not texts:
        raise AssertionError(f"{folder}/cases.json: rows that do not hold: {wrong}, of {len(texts)}")
    ranks = [tokenizer.vocabulary.token_bytes(index) for index in range(256)]
    return {"first256_bytes": np.frombuffer(b"".join(ranks), np.uint8)}
