"""`python -m vlm_jax.cli.train --release --data --workdir --export`: a release is taught what pictures show."""

import json
import random
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

import vlm_jax
from tests.contracts import releases

from .conftest import ROOT, environment

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
NUM_PICTURES = 60


def draw(path, rng):
    """A disc or a square of one colour, somewhere on white; returns the colour's name."""
    name, x, y, size = rng.choice(list(COLOURS)), rng.randint(2, 10), rng.randint(2, 10), rng.randint(12, 18)
    picture = Image.new("RGB", (32, 32), "white")
    form = rng.choice([ImageDraw.Draw(picture).ellipse, ImageDraw.Draw(picture).rectangle])
    form((x, y, x + size, y + size), fill=COLOURS[name])
    picture.save(path)
    return name


def record(name, images, question, answer):
    turns = [("human", "<image>\n" * len(images) + question), ("gpt", answer)]
    said = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": name, **({"image": images} if images else {}), "conversations": said}


@pytest.fixture
def folder(tmp_path):
    """A release with random weights, `train.json` in LLaVA's format, and pictures that are in neither."""
    (tmp_path / "release").mkdir()
    releases.make("llava", tmp_path / "release")
    rng = random.Random(0)
    colours = [draw(tmp_path / f"{number}.png", rng) for number in range(NUM_PICTURES)]
    records = [record(f"{i}", [f"{i}.png"], "Which colour?", colour) for i, colour in enumerate(colours)]
    for i in range(0, NUM_PICTURES, 6):
        names = [f"{i}.png", f"{i + 1}.png"]
        records.append(record(f"two{i}", names, "Which colours?", f"{colours[i]}, {colours[i + 1]}"))
        records.append(record(f"text{i}", [], "Say yes.", "yes"))
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    return tmp_path


def run(folder, words):
    env = {**environment(), "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    words = [sys.executable, *words, "--compilation_cache="]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def commands():
    """Those of the page, word for word."""
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text()
    block = next(part for part in page.split("```")[1::2] if part.startswith("bash\npython"))
    found = [shlex.split(line) for line in block.strip().splitlines()[1:]]
    assert [words[0] for words in found] == ["python", "python"]
    return [words[1:] for words in found]


def test_a_release_answers_what_it_was_taught(folder):
    train, generate = commands()
    status, out, errors = run(folder, train)
    assert status == 0, errors
    assert "chosen: --config.row.length=" in out and "chosen: --config.stages.instruction.steps=" in out
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["release"] == str(folder / "release") and config["data"]["held_out"] == 4

    rng = random.Random(1)
    taught, model = vlm_jax.from_pretrained(folder / "finetuned"), vlm_jax.from_pretrained(folder / "run")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    path, right = folder / "unseen.png", []
    for number in range(NUM_PICTURES):
        colour = draw(path, rng)
        answer = taught.generate(question, [path], max_new_tokens=8).text.strip()
        right.append(answer == colour)
        if number < 3:
            assert model.generate(question, [path], max_new_tokens=8).text.strip() == answer
    assert np.mean(right) >= 0.9
    status, out, errors = run(folder, generate)
    assert status == 0 and out.splitlines()[0].strip() == answer, errors

    train[train.index("--data=train.json")] = "--data=~/train.json"  # the same file
    status, _, errors = run(folder, train)
    assert status == 1 and "finetuned/model.safetensors exists: write to another folder" in errors


def test_help_has_the_flags_of_all_modules(folder):
    _, out, _ = run(folder, ["-m", "vlm_jax.cli.train", "--help"])
    for flag in ("release", "workdir", "compilation_cache", "coordinator_address", "init_from"):
        assert f"  --{flag}:" in out
    assert "--config.KEY=VALUE overrides a key" in " ".join(out.split()) and "--[no]list_keys" in out
