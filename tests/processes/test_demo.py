"""`python -m vlm_jax.cli.demo` as a process, driven by a browser; `--help`, and user errors.

    VLM_JAX_SCREENSHOTS=docs/assets pytest -n 0 tests/processes/test_demo.py

also writes the screenshots of docs/how-to/demo.md.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.demo import scripted

from .browser import started as browser_started
from .conftest import ROOT, environment

QUESTION = "What does the sign say?"
BUDGET = 36
SECONDS = 60_000  # milliseconds of playwright
SHOTS = (("desktop", 1200, "light"), ("narrow", 400, "dark"))
IN_SECONDS = re.compile(r"^[\d.e+-]+( ×)?$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "street"
    path.mkdir()
    scripted.write(path)
    return path


def words(command, *arguments):
    return [sys.executable, "-m", f"vlm_jax.cli.{command}", *arguments, "--compilation_cache="]


def run(*arguments):
    return subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(folder):
    arguments = words("demo", f"--release={folder}", "--port=0", "--max_pixels=1000000", "--max_new_tokens=32")
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    told = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            break
    assert found, told
    yield found[1]
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def opened(browser, site, width, scheme):
    """The page, and the hosts that it asked."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
    page.set_default_timeout(SECONDS)
    page.goto(site)
    page.wait_for_selector("#ask")
    return page, hosts


def finished(page):
    """Waits until both answers are there, with their times."""
    page.wait_for_function(
        "() => document.querySelector('#drawing img') && !document.querySelector('#message p')"
        " && document.querySelectorAll('#comparison td')[8].innerText != '–'"
    )


def numbers(page):
    return page.locator("#comparison td").all_inner_texts()


@pytest.mark.parametrize(("name", "width", "scheme"), SHOTS)
def test_a_question_by_the_keyboard(browser, site, folder, tmp_path, name, width, scheme):
    scripted.street().save(tmp_path / "street.png")
    said = run(
        *words("generate", f"--checkpoint={folder}", f"--image={tmp_path / 'street.png'}", f"--prompt={QUESTION}"),
        *("--max_new_tokens=32", f"--token_budget={BUDGET}", "--reducer=visionzip"),
    )
    assert said.returncode == 0 and said.stdout.startswith('The red sign says "STOP"'), said.stderr
    page, hosts = opened(browser, site, width, scheme)
    page.set_input_files("#picture input[type=file]", tmp_path / "street.png")
    page.wait_for_selector("#picture img")
    page.focus("#question textarea")
    page.keyboard.type(QUESTION)
    slider = page.locator("#budget input[type=range]")
    slider.focus()
    assert slider.get_attribute("max") == "144" and slider.input_value() == "16"
    for _ in range(BUDGET - 16):
        page.keyboard.press("ArrowRight")
    page.focus("#question textarea")
    page.keyboard.press("Enter")
    finished(page)
    answers = [page.input_value(f"#{where} textarea") for where in ("answer", "full")]
    assert [answer + "\n" for answer in answers] == [said.stdout] * 2
    found = numbers(page)
    assert found[:3] == [str(BUDGET), "144", "4 ×"]
    assert all(map(IN_SECONDS.match, found[3:9])), found
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert hosts == {site.removeprefix("http://")}
    if shots := os.environ.get("VLM_JAX_SCREENSHOTS"):
        page.screenshot(path=tmp_path / "shot.png", full_page=True)
        shutil.copy(tmp_path / "shot.png", pathlib.Path(shots) / f"demo-{name}.png")
    page.context.close()


def test_bad_input_has_a_message_and_the_next_question_is_answered(browser, site, tmp_path):
    scripted.street().save(tmp_path / "street.png")
    scripted.street().resize((1200, 900)).save(tmp_path / "huge.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page, _ = opened(browser, site, 1200, "light")

    def refused(words):
        page.click("#ask")
        page.get_by_role("alert").filter(has_text=re.compile(words)).wait_for()

    def uploads(name):
        page.locator("#picture input[type=file]").set_input_files(tmp_path / name)
        page.wait_for_selector("#picture img")

    refused("There is no picture yet")
    uploads("street.png")
    refused("There is no question yet")
    page.fill("#question textarea", QUESTION)
    for name, told in (("broken.png", "unknown image format"), ("huge.png", "more than max_pixels=1000000")):
        page.get_by_label("Clear").first.click()
        uploads(name)
        refused(told)
    page.get_by_label("Clear").first.click()
    uploads("street.png")
    page.click("#ask")
    finished(page)
    page.context.close()


def test_help_has_all_flags_with_defaults():
    told = run(sys.executable, "-m", "vlm_jax.cli.demo", "--help").stdout
    for flag, default in (
        ("port", "7860"),
        ("max_new_tokens", "128"),
        ("max_pixels", "50000000"),
        ("dtype", "float32"),
    ):
        assert re.search(rf"--{flag}:[^-]*\(default: '{default}'\)", told), flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--release=/none"], "CheckpointFileError"),
        (["--release=/none", "--max_pixels=0"], "flag --max_pixels=0: expected at least 1, got 0"),
    ],
)
def test_an_error_of_the_user_is_one_message(arguments, message):
    done = run(*words("demo", *arguments))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
