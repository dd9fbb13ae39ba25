"""A tiny run on files of one's own: eight grey pictures, questions and a tokenizer of single characters."""

import json
import pathlib

import tokenizers
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from configs import base

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ?.,!:;()<>/-_\n\u00e9\u0301AYN"


def write_tokenizer(folder: pathlib.Path, normalizer=None) -> pathlib.Path:
    """A tokenizer.json with one token a character, and a normalizer of `tokenizers`."""
    table = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    backend = tokenizers.Tokenizer(models.BPE(table, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def records(count: int) -> list[dict]:
    return [{"id": i, "image": f"{i}.png", "question": "what?", "answer": "ab"[i % 2]} for i in range(count)]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_files(folder: pathlib.Path) -> None:
    """`train.jsonl`, `test.jsonl`, pictures and the tokenizer."""
    write(folder / "train.jsonl", records(8))
    write(folder / "test.jsonl", records(4))
    for number in range(8):
        Image.new("L", (24, 24), 30 * number).save(folder / f"{number}.png")
    write_tokenizer(folder)


def config_of(folder: pathlib.Path, **changes) -> ConfigDict:
    """Four steps on the files of a folder; `changes` are values by path, with `__` for a dot."""
    config = base.get_config()
    config.token_budget = 4
    config.data = ConfigDict(
        {
            "kind": "conversations",
            "channels": 1,
            "train_path": f"{folder}/train.jsonl",
            "evaluation_path": f"{folder}/test.jsonl",
        }
    )
    tokenizer = str(folder / "tokenizer.json")
    config.processor.update({"image_size": (24, 24), "independent_turns": False, "tokenizer": tokenizer})
    config.encoder.update({"patch_size": 6, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "remat": "none"})
    config.decoder.update({"width": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 32, "remat": "none"})
    config.connector = ConfigDict({"kind": "pool"})
    config.evaluation.batch_size = 4
    stage = {"objective": "next_token", "stream": "questions", "steps": 4, "batch_size": 4, "warmup_steps": 0}
    stage["learning_rates"] = {"encoder": 1e-3, "connector": 1e-3, "decoder": 1e-3}
    config.stages, config.schedule = ConfigDict({"tuning": stage}), ("tuning",)
    config.loop.update({"save_every": 2, "log_every": 1, "writers": ()})
    with config.ignore_type():
        for path, value in changes.items():
            *parents, key = path.split("__")
            section = config
            for name in parents:
                section = section[name]
            section[key] = value
    return config.lock()
