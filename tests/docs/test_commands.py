"""The commands and the code of every page, run word for word in a copy of the repository with small releases."""

import gzip
import json
import random
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image, ImageDraw

from tests.contracts import releases
from tests.golden.conftest import DATA
from tests.pretrained.test_image_text import siglip_model
from tests.processes.conftest import environment, programs  # noqa: F401 (`programs` is a fixture of every test)

from .sources import PAGES, ROOT, blocks, name_of

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
TIMEOUT = 1200


def runnable(page):
    """Whether a page has anything to run."""
    return any(one.mark != "not run" and one.language in ("bash", "python") for one in blocks(page))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The names that pages use for releases and files of a reader: random weights, pictures of one colour."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, system in (("release", "llava"), ("tiled-release", "internvl")):
        (folder / name).mkdir()
        releases.make(system, folder / name)
    shutil.copytree(DATA / "bv_siglip", folder / "siglip")
    (folder / "siglip" / "spiece.model").write_bytes(siglip_model(60))
    shutil.copytree(DATA / "vit_jax_token", folder / "vit")
    config = json.loads((folder / "vit" / "config.json").read_text())
    config["id2label"] = {str(number): f"class {number}" for number in range(7)}
    (folder / "vit" / "config.json").write_text(json.dumps(config))
    rng, records = random.Random(0), []
    for name in ("a", "b", "unseen", *map(str, range(1, 41))):
        colour = rng.choice(list(COLOURS))
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).rectangle((4, 4, 26, 26), fill=COLOURS[colour])
        picture.save(folder / f"{name}.png")
        if name.isdigit():
            said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
            records.append({"id": name, "image": f"{name}.png", "conversations": said})
    (folder / "train.json").write_text(json.dumps(records[:32]))
    questions = "".join(json.dumps(record) + "\n" for record in records[32:])
    (folder / "questions.jsonl").write_text(questions)
    chat = [{"id": "c", "conversations": [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]}]
    (folder / "chat.jsonl.gz").write_bytes(gzip.compress((json.dumps(chat[0]) + "\n").encode()))
    pair = {"image": "1.png", "prompt": "Which colour?", "chosen": "red", "rejected": "a colour"}
    (folder / "preferences.json").write_text(json.dumps([pair] * 4))
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path):
    """A clone with the stand-ins; what pages change is a copy."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("vlm_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=ignored)
    shutil.copytree(stand_ins, tmp_path / "clone", dirs_exist_ok=True)
    return tmp_path / "clone"


def write(folder, block):
    """Writes the file of a titled block, or makes the change of a diff."""
    path = folder / block.title
    if block.language != "diff":
        path.write_text(block.text)
        return
    lines = block.text.splitlines()
    old = "".join(line[1:] + "\n" for line in lines if line[0] != "+")
    new = "".join(line[1:] + "\n" for line in lines if line[0] != "-")
    text = path.read_text()
    assert text.count(old) == 1, f"{block.title}: the lines before the change are not there once:\n{old}"
    path.write_text(text.replace(old, new))


def process(folder, words):
    """Arguments of `subprocess.run` for Python with words, on one device."""
    env = {**environment(1), "PYTHONPATH": str(folder), "HOME": str(folder)}
    return {"args": [sys.executable, *words], "cwd": folder, "env": env, "text": True}


def run(folder, words):
    """(exit status, standard output, standard error) of Python with words."""
    done = subprocess.run(**process(folder, words), capture_output=True, timeout=TIMEOUT)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def background(folder):
    """Starts Python with words and returns when it says a text; the process is killed after the page."""
    started = []

    def start(words, text):
        file = folder / f"background_{len(started)}.txt"
        with open(file, "w") as log:
            started.append(subprocess.Popen(**process(folder, words), stdout=log, stderr=log))
        while text not in file.read_text():
            assert started[-1].poll() is None, file.read_text()
            time.sleep(0.5)

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name_of)
def test_commands_of_the_page(page, folder, background):
    """In their order; the code of a page is one script after them, as it may use what they wrote."""
    code = []
    for block in blocks(page):
        if block.mark == "not run":
            continue
        if block.title:
            write(folder, block)
        elif block.language == "python":
            code.append(block.text)
        elif block.language == "bash":
            for words in block.commands():
                added = shlex.split(block.detail) if block.mark == "run with" else []
                words = [*words[1:], *added, "--compilation_cache="]
                if block.mark == "in the background":
                    background(words, block.detail)
                    continue
                status, out, errors = run(folder, words)
                if block.mark == "fails":
                    assert status == 1 and block.detail in errors and "Traceback" not in errors, errors
                else:
                    assert status == 0, f"{shlex.join(words)}\n{out[-3000:]}\n{errors[-3000:]}"
    if code:
        (folder / "page.py").write_text("\n".join(code))
        status, out, errors = run(folder, ["page.py"])
        assert status == 0, f"{out[-3000:]}\n{errors[-3000:]}"
