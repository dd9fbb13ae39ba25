"""`python -m vlm_jax.cli.demo` as a process, driven by a browser.

    VLM_JAX_SCREENSHOTS=docs/assets pytest -n 0 tests/processes/test_demo.py

also writes the screenshots of docs/how-to/demo.md.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.demo import scripted

from .browser import started
from .conftest import ROOT, environment

INSTALLED = pathlib.Path(sys.prefix) / "demo"  # Gradio and what it asks for; see GRADIO in the Makefile
QUESTION = "What does the sign say?"
ENDLESS = f"What does the sign say {scripted.FOREVER}?"
BUDGET = 36
SECONDS = 60_000  # milliseconds of playwright
IN_SECONDS = re.compile(r"[\d.e+-]+( ×)?")
DONE = """() => document.querySelector('#drawing img') && !document.querySelector('#message p')
    && document.querySelectorAll('#comparison td')[8].innerText != '–'"""
BEGINS = "words => document.querySelector('#answer textarea').value.startsWith(words)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release, and pictures beside it."""
    path = tmp_path_factory.mktemp("demo") / "street"
    path.mkdir()
    scripted.write(path)
    scripted.street().save(path / "street.png")
    scripted.street().resize((1200, 900)).save(path / "huge.png")
    (path / "broken.png").write_bytes((path / "street.png").read_bytes()[:2000])
    (path / "text.png").write_bytes(b"no picture")
    return path


@pytest.fixture(scope="module")
def site(folder):
    words = [sys.executable, "-m", "vlm_jax.cli.demo", f"--release={folder}", "--port=0", "--max_pixels=1000000"]
    words += ["--max_new_tokens=16000", "--compilation_cache="]  # so many take minutes
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join((str(INSTALLED), env["PYTHONPATH"]))
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
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
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def opened(browser, site):
    """Opens the page, as another user each time; and checks that it asks no other site."""
    contexts, hosts = [], set()

    def opens(width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
        page.set_default_timeout(SECONDS)
        page.goto(site)
        page.wait_for_selector("#ask")
        return page

    yield opens
    for context in contexts:
        context.close()
    assert hosts == {site.removeprefix("http://")}


def uploads(page, path):
    page.locator("#picture input[type=file]").set_input_files(path)
    page.wait_for_selector("#picture img")


def answers(page):
    return [page.input_value(f"#{where} textarea") for where in ("answer", "full")]


def says(page, words):
    page.locator("#message p").filter(has_text=words).wait_for()


@pytest.mark.parametrize(("name", "width", "scheme"), [("wide", 1200, "light"), ("narrow", 390, "dark")])
def test_a_question_by_the_keyboard(opened, folder, name, width, scheme):
    page = opened(width, scheme)
    uploads(page, folder / "street.png")
    page.focus("#question textarea")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")  # the number of the slider, then the slider
    page.keyboard.press("Tab")
    slider = page.locator("#budget input[type=range]")
    assert slider.get_attribute("max") == "144" and slider.input_value() == "16"
    for _ in range(BUDGET - 16):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")  # the menu, then Ask
    page.get_by_role("listbox").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)
    assert answers(page) == [scripted.ANSWER] * 2
    numbers = page.locator("#comparison td").all_inner_texts()
    assert numbers[:3] == [str(BUDGET), "144", "4 ×"] and numbers[9:] == ["16", "16", ""]
    assert all(map(IN_SECONDS.fullmatch, numbers[3:9])), numbers
    assert not page.get_by_role("listbox").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#full_drawing img").count() == 1
    if shots := os.environ.get("VLM_JAX_SCREENSHOTS"):
        page.screenshot(path=pathlib.Path(shots) / f"demo-{name}.png", full_page=True)


def test_bad_input_has_a_message_and_the_next_question_is_answered(opened, folder):
    page = opened()
    page.click("#ask")
    says(page, "There is no picture yet: choose one, or drop it on the page.")
    uploads(page, folder / "street.png")
    page.click("#ask")
    says(page, "There is no question yet: write one.")
    page.fill("#question textarea", QUESTION)
    for name, told in (("text", "unknown image format"), ("broken", "truncated"), ("huge", "more than max_pixels")):
        page.get_by_label("Remove Image").click()
        uploads(page, folder / f"{name}.png")
        page.press("#question textarea", "Enter")
        says(page, told)
    page.get_by_label("Remove Image").click()
    uploads(page, folder / "street.png")
    page.fill("#budget input[type=number]", "5")
    page.click("#reducer input")
    page.get_by_role("option", name="none").click()
    page.click("#ask")
    says(page, "The token budget: an image takes at least 144 visual tokens, more than the 5 allowed")
    page.fill("#budget input[type=number]", "9999")
    page.click("#ask")
    page.wait_for_function(DONE)
    assert page.locator("#comparison td").all_inner_texts()[:3] == ["144", "144", "1 ×"]


def asks(page, question):
    page.fill("#question textarea", question)
    page.click("#ask")


def test_the_next_user_is_answered_once_the_tab_is_closed(opened, folder):
    first, second = opened(), opened()
    for page in (first, second):
        uploads(page, folder / "street.png")
    asks(first, ENDLESS)
    first.wait_for_function(BEGINS, arg=scripted.ANSWER * 2)
    asks(second, QUESTION)
    says(second, "Waiting: questions are answered one at a time")
    assert answers(second) == ["", ""]
    first.close()
    second.wait_for_function(DONE)
    assert answers(second) == [scripted.ANSWER] * 2


def test_a_question_is_answered_after_one_that_was_stopped(opened, folder):
    """Also one that was stopped while it waited."""
    first, second = opened(), opened()
    for page in (first, second):
        uploads(page, folder / "street.png")
        page.click("#stop")  # stops nothing
        asks(page, ENDLESS)
        says(page, "Answering at the budget" if page is first else "Waiting")
    second.click("#stop")
    says(second, "Stopped")
    asks(second, QUESTION)
    first.wait_for_function(BEGINS, arg=scripted.ANSWER * 2)
    first.click("#stop")
    asks(first, QUESTION)
    for page in (first, second):
        page.wait_for_function(DONE)
        assert answers(page) == [scripted.ANSWER] * 2
