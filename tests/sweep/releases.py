"""A tiny released folder of a vision-language model with a tokenizer, and a file of questions, made without torch."""

import json
import string

import numpy as np
import safetensors.numpy
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from tests.golden.conftest import DATA

VISUAL_TOKENS = 36  # of a picture: 24 pixels a side in patches of 4
MAX_NEW_TOKENS = 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def write_release(folder) -> None:
    """LLaVA-1.5 with random weights, one token a character; its first layer comes once more, for FastV to drop in."""
    folder.mkdir()
    source = DATA / "llava15"
    config = json.loads((source / "config.json").read_text())
    config["vision_tower_config"] = json.loads((source / "vision_tower_config.json").read_text())
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    added = f"model.layers.{config['num_hidden_layers']}."
    tensors |= {name.replace("model.layers.0.", added): tensors[name] for name in tensors}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [*SPECIAL, *string.printable]
    words = models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_questions(path, answers) -> None:
    """One record a list of answers, each with an image and as many independent questions as answers."""
    rng = np.random.default_rng(0)
    lines = []
    for number, of_record in enumerate(answers):
        image = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path.parent / image)
        turns = [[f"what is {turn}?", answer] for turn, answer in enumerate(of_record)]
        lines.append(json.dumps({"id": str(number), "image": image, "turns": turns}))
    path.write_text("\n".join(lines) + "\n")


def conversation(turn):
    """A question of `write_questions`, asked by itself."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {turn}?"}]}]
