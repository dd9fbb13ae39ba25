"""What pages name exists: flags, keys, targets of make, extras, files and links."""

import re
import sys

import nbformat
import pytest

from colabs import execute

from .sources import PAGES, ROOT, blocks, loose_flags, name_of, used_flags

sys.path.append(str(ROOT / "docs"))

import config_keys
import flag_tables
import metric_tables
import notebook_pages
import system_tables

OTHERS = {"spot", "logdir", "force_simple", "log_samples", "directory"}  # of gcloud, tensorboard, lmms-eval, http
NAMES = [name_of(page) for page in PAGES]
by_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.fixture(scope="module")
def flags():
    """The flags of every command."""
    return {name: flag_tables.accepted(name) for name in flag_tables.commands()}


@pytest.fixture(scope="module")
def keys():
    """Names of all config keys, with those inside of sections, and the sections."""
    page = config_keys.page()
    names = re.findall(r"^\| `([\w.]+)` \|", page, re.M)
    return {part for name in names for part in name.split(".")} | set(re.findall(r"^## config\.(\w+)", page, re.M))


def test_every_command_is_known(flags):
    assert set(flags) >= {"convert", "evaluate", "generate", "plan", "sweep", "train"}
    assert {"image", "draw", "compilation_cache"} <= flags["generate"] and "workdir" not in flags["generate"]
    assert {"workdir", "release", "config", "distributed", "compilation_cache"} <= flags["train"]


def test_flags_have_values_and_defaults():
    """Of some flags, written here by hand; absl's own words for values and repetition are left out."""
    page = flag_tables.page()
    for row in (
        "| `--dtype` | bfloat16, float16, float32 | `float32` | Dtype of parameters and computation. |",
        "| `--image` | repeatable |  | An image for the prompt; repeatable, in order. |",
        "| `--reducers` | a comma separated list | `random,uniform_stride,divprune` |",
    ):
        assert row in page, row


def test_keys_have_types_ranges_and_defaults():
    """Of some keys, written here by hand; every key has a meaning."""
    page = config_keys.page()
    for row in (
        "| `rank` | int | at least 0 | `0` | of the adapters; 0 for none. |",
        "| `log_every` | int | at least 1 | `20` | steps between writes of `metrics.jsonl`, which has one line per "
        "step, and of a line on the terminal. |",
        "| `pack` | bool |  | `False` | whether several samples share a row, told apart by segment ids. |",
        "| `mixture.NAME.path` | str |  | *required* | of the file. |",
    ):
        assert row in page, row
    assert not [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    for solved in ("output_grid", "num_queries", "num_kept", "features"):
        assert f"| `{solved}` |" not in page


def test_keys_of_the_base_config_are_on_the_page(keys):
    from configs import base

    def names(section):
        for key in section:
            yield key
            if key not in ("task_weights", "special_tokens") and hasattr(section[key], "items"):
                yield from names(section[key])

    missing = set(names(base.get_config())) - keys - {"kind", "stages", "schedule"}
    assert not missing


def test_systems_have_the_visual_tokens_of_their_papers():
    """LLaVA-1.5, section 3.2: 24 x 24; Qwen-VL, section 2.1: 256 queries; InternVL 1.5, section 3.1: 256 a tile."""
    rows = [row.strip("| ").split(" | ") for row in system_tables.page().splitlines() if row.startswith("| `")]
    tokens = {row[0].strip("`"): row[-1] for row in rows}
    assert tokens["llava-hf/llava-1.5-7b-hf"] == "576"
    assert tokens["Qwen/Qwen-VL"] == tokens["OpenGVLab/InternVL2-8B"] == "256"
    assert tokens["Qwen/Qwen2.5-VL-7B-Instruct"] == "by the size of the image"


def test_metrics_have_their_tasks():
    page = metric_tables.page()
    (row,) = [row for row in page.splitlines() if row.startswith("| `anls` |")]
    assert "`mean`" in row and "Biten et al. 2019" in row and row.endswith("| `docvqa`, `infovqa`, `stvqa` |")


@by_page
def test_flags_and_keys_exist(page, flags, keys):
    everyone = set().union(*flags.values())
    named = used_flags(page) + [("", flag) for flag in loose_flags(page)]
    for command, flag in named:
        if flag.startswith("config."):
            last = flag.split(".")[-1]
            labels = ("encoder_pretraining", "instruction", "base")
            path = [part for part in flag.split(".")[1:] if part not in labels]
            assert last == "KEY" or last == "kind" or path[-1] in keys, f"--{flag}: no such key"
        elif flag != "help":
            assert flag in (flags[command] if command else everyone | OTHERS), f"{command} --{flag}: no such flag"


@by_page
def test_targets_extras_and_files_exist(page):
    text = page.read_text()
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()
    for target in re.findall(r"\bmake ([a-z]+)(?=[`\s])", " ".join(one.text for one in blocks(page)) + text):
        if f"`make {target}" in text or target in ("sweep", "test"):
            assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for extra in re.findall(r"(?:\.|vlm_jax)\[(\w+)\]'", text):
        assert f'"{extra}": [' in setup, f"extra {extra}"
    for path in re.findall(r"\b((?:configs|experiments|tests|colabs|vlm_jax)/[\w/.-]+\.(?:py|md|ipynb|png))", text):
        titles = [one.title for one in blocks(page)]
        assert (ROOT / path).exists() or path in titles or "test_middle" in path, path


@by_page
def test_links_lead_to_pages(page):
    """Of pages that the build makes, the names are in docs/hooks.py; their anchors are checked by mkdocs."""
    names = ("commands.md", "config.md", "metrics.md", "systems.md", "visual-tokens.md", "api/")
    made = ["notebooks/", *(f"reference/{name}" for name in names)]
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith("http") and not any(name in link for name in made) and link != "assets/frontier.png":
            assert (page.parent / link).resolve().exists(), link


@by_page
def test_marks_say_why(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "json", "diff", "text"), block.language
        assert bool(block.mark) == bool(block.detail.strip())
        if block.language == "bash" and block.mark != "not run":
            assert all(words[:2] == ["python", "-m"] for words in block.commands()), block.text


def test_no_two_commands_write_one_folder():
    """A reader follows several pages in one clone, where another run's workdir or an older export is refused."""
    writers: dict[str, set[str]] = {}
    for page in PAGES:
        for words in (words for block in blocks(page) if block.language == "bash" for words in block.commands()):
            for word in words:
                if folder := re.match(r"--(?:workdir|export|target)=(.+)", word):
                    writers.setdefault(folder[1], set()).add(" ".join(words))
    assert "workdir/four" in writers and "finetuned" in writers
    assert not {folder: found for folder, found in writers.items() if len(found) > 1}


def test_badges_say_what_setup_says():
    setup = (ROOT / "setup.py").read_text()
    least = re.search(r'python_requires=">=([\d.]+)"', setup)[1]
    jax = re.search(r'"jax>=([\d.]+)"', setup)[1]
    for badge, said in (("python", f"Python: {least} or newer"), ("jax", f"JAX: {jax} or newer")):
        assert f"<title>{said}</title>" in (ROOT / "docs" / "assets" / f"{badge}.svg").read_text()
    assert 'license="Apache-2.0"' in setup


@pytest.mark.parametrize("short", [True, False])
def test_the_page_of_a_notebook(monkeypatch, short):
    """It says which form was run, names figures by their headings, links them, and leaves out the lines of logs."""
    notebook = execute.read("plan_a_pod", short=short)
    (cell,) = [cell for cell in notebook.cells if "axes.barh" in cell.source]
    said = nbformat.v4.new_output("stream", text="I1130 14:10:42.552436 140378 loop.py:346] stage\nfits\n")
    cell.outputs = [said, nbformat.v4.new_output("display_data", {"image/png": "cG5n"})]
    monkeypatch.setattr(execute, "kept", lambda name: notebook)
    text, figures = notebook_pages.page("plan_a_pod")
    assert figures == {"plan_a_pod-0.png": b"png"}
    figure = '[![Memory per chip](plan_a_pod-0.png){ loading="lazy" }](plan_a_pod-0.png)'
    assert f'```\n\n<pre class="output">fits</pre>\n\n{figure}\n' in text
    assert ("short form" in text) == short
