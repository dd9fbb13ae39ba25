"""The report, read back with an HTML parser of its own: its numbers, boxes and texts, and no network."""

import base64
import html.parser
import io
import json
import pathlib
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from vlm_jax.evals.intervals import wilson_interval
from vlm_jax.processors.boxes import format_box, parse_boxes, to_pixels
from vlm_jax.sweep.hard import with_hard_questions
from vlm_jax.sweep.report import Example, write_report

CONTROLS = frozenset({"random", "downsample_image"})
ATTACK = "</script><script>alert('x')</script><img src=https://example.com/x onerror=alert(1)>"
VOID = {"meta", "img", "br", "rect", "link", "input", "hr"}


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def all(self, tag=None, **attributes):
        """The elements below, in order, with a tag and attributes (`data_label` is `data-label`)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        for child in self.children:
            if isinstance(child, Element):
                fits = all(child.attributes.get(name) == value for name, value in wanted.items())
                if tag in (None, child.tag) and fits:
                    yield child
                yield from child.all(tag, **attributes)

    @property
    def text(self):
        joined = "".join(child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(joined.split())


class Page(html.parser.HTMLParser):
    """Builds the tree, and fails on an end tag without its beginning."""

    def __init__(self, text):
        super().__init__()
        self.root = self._open = Element("root", {}, None)
        self.feed(text)
        self.close()
        assert self._open is self.root

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self._open)
        self._open.children.append(element)
        if tag not in VOID:
            self._open = element

    def handle_endtag(self, tag):
        assert self._open.tag == tag
        self._open = self._open.parent

    def handle_startendtag(self, tag, attrs):
        self._open.children.append(Element(tag, dict(attrs), self._open))

    def handle_data(self, data):
        self._open.children.append(data)


def result(connector, budget, accuracy, **replaced):
    return {
        "connector": connector,
        "token_budget": budget,
        "num_visual_tokens": budget,
        "realised_visual_tokens": {"mean": budget, "max": budget},
        "accuracy": {
            task: {"mean": mean, "low": low, "high": high, "n": 200} for task, (mean, low, high) in accuracy.items()
        },
        "num_params": {"encoder": 1_000_000, "connector": 250_000, "decoder": 2_000_000},
        "flops": {"encoder": 400_000_000, "connector": 1_000_000, "prefill": 5_000_000 * budget},
        "step_seconds": 0.05,
        "peak_bytes": 300 * 2**20,
        "seed": 0,
        "config_hash": "abc",
        "command": f"python -m vlm_jax.cli.sweep --only={connector}@{budget} --note='a <b> & \"c\"'",
    } | replaced


RESULTS = [
    result(
        "mlp",
        64,
        {"read": (0.9, 0.85, 0.94), "locate": (0.5, 0.43, 0.57)},
        prefill_seconds=0.002,
        decode_seconds=0.0005,
    ),
    result("pool", 16, {"read": (0.88, 0.83, 0.92), "locate": (0.6, 0.53, 0.67)}),
    result("pool", 4, {"read": (0.7, 0.63, 0.76), "locate": (0.4, 0.33, 0.47)}, step_seconds=None),
    result("random", 16, {"read": (0.5, 0.43, 0.57)}),
    result("downsample_image", 9, {"locate": (0.55, 0.48, 0.62)}),
]
HEIGHT, WIDTH = 40, 64
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
REFERENCE = format_box((12, 10, 24, 22), HEIGHT, WIDTH)
ANSWERED = format_box((13, 9, 30, 21), HEIGHT, WIDTH)
EXAMPLES = [
    Example(
        PIXELS,
        "locate <7>",
        REFERENCE,
        "locate",
        {"mlp@64": (ANSWERED, True), "pool@16": (ATTACK, False), "pool@4": (ANSWERED + REFERENCE, False)},
    ),
    Example(np.repeat(PIXELS, 3, -1), "read row 1", "7", "read", {"mlp@64": ("", False), "pool@16": ("7", True)}),
]


def report(tmp_path, results=RESULTS, examples=EXAMPLES, title="A sweep", retained=None):
    path = epath.Path(tmp_path) / "report.html"
    path.write_text("an earlier one")
    write_report(results, path, controls=CONTROLS, examples=examples, title=title, retained=retained)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text()).root


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(tmp_path_factory.mktemp("report"), title="A <sweep>")


def one(elements):
    (element,) = elements
    return element


def test_nothing_is_fetched(page):
    for element in page.all():
        assert element.tag not in {"link", "iframe", "object", "embed", "base", "source"}
        for name, value in element.attributes.items():
            assert name not in {"href", "srcset", "action", "background", "poster", "style", "xlink:href"}
            assert not name.startswith("on")
            if name == "src":
                assert element.tag == "img"
                assert value.startswith("data:image/png;base64,")
    style = one(page.all("style")).text
    assert "url(" not in style
    assert "@import" not in style
    policy = one(page.all("meta", http_equiv="Content-Security-Policy")).attributes["content"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_the_only_scripts_are_the_data_plotly_and_the_pages_own(page):
    data, plotly, own = page.all("script")
    assert data.attributes == {"type": "application/json", "id": "data"}
    assert plotly.attributes == own.attributes == {}
    assert plotly.text.startswith("/** * plotly.js v")
    assert "http" not in own.text
    assert "showSendToCloud: false" in own.text  # plotly's own button would upload the chart


def test_a_models_answer_stays_text(page):
    shown = one(page.all("dd", data_label="pool@16", class_="said wrong"))
    assert shown.text == ATTACK + " ✗ wrong"
    assert one(page.all("h1")).text == "A <sweep>"
    assert [dd.text for dd in page.all("dd", class_=None)] == ["locate <7>", "read row 1"]


def test_the_tables_numbers(page):
    rows = list(one(one(page.all("section", id="points")).all("tbody")).all("tr"))
    assert [row.attributes["data-point"] for row in rows] == [f"{r['connector']}@{r['token_budget']}" for r in RESULTS]
    assert [[cell.text for cell in row.all("td")][:-1] for row in rows] == [
        ["0", "64", "T F 90.0[85.0, 94.0]", "50.0[43.0, 57.0]", "0.721", "2", "0.5", "3.25", "50", "300"],
        ["0", "16", "T F 88.0[83.0, 92.0]", "T F 60.0[53.0, 67.0]", "0.481", "–", "–", "3.25", "50", "300"],
        ["0", "4", "T F 70.0[63.0, 76.0]", "T F 40.0[33.0, 47.0]", "0.421", "–", "–", "3.25", "–", "300"],
        ["0", "16", "50.0[43.0, 57.0]", "–", "0.481", "–", "–", "3.25", "50", "300"],
        ["0", "9", "–", "T F 55.0[48.0, 62.0]", "0.446", "–", "–", "3.25", "50", "300"],
    ]
    assert [row.children[1].text for row in rows] == [
        "mlp@64",
        "pool@16",
        "pool@4",
        "random@16 control",
        "downsample_image@9 control",
    ]
    for row, line in zip(rows, RESULTS, strict=True):
        assert one(row.all("code")).text == line["command"]
        copy, code = one(row.all("td", class_="command")).children[0].children
        assert (copy.attributes["class"], code.tag) == ("copy", "code")
    assert float(list(rows[0].all("td"))[4].attributes["data-sort"]) == pytest.approx(0.721)


def test_the_charts_data(page):
    data = json.loads(one(page.all("script", id="data")).children[0])
    assert data["tasks"] == ["read", "locate"]
    assert list(data["axes"]) == ["tokens", "flops", "parameters", "step_seconds", "prefill_seconds", "decode_seconds"]
    assert [point["label"] for point in data["points"]] == [
        "mlp@64",
        "pool@16",
        "pool@4",
        "random@16",
        "downsample_image@9",
    ]
    for point, line in zip(data["points"], RESULTS, strict=True):
        seeds = {task: {str(line["seed"]): share["mean"]} for task, share in line["accuracy"].items()}
        assert point["accuracy"] == {task: share | {"seeds": seeds[task]} for task, share in line["accuracy"].items()}
        assert point["costs"]["tokens"] == line["num_visual_tokens"]
        assert point["costs"]["flops"] == pytest.approx(0.401 + 0.005 * line["token_budget"])
        assert point["costs"]["parameters"] == pytest.approx(3.25)
        assert point["drawn_costs"]["tokens"] == pytest.approx(line["num_visual_tokens"], rel=0.1)
        assert point["drawn_costs"]["flops"] == point["costs"]["flops"]
    assert data["points"][2]["drawn_costs"]["step_seconds"] is None
    assert data["fronts"]["read"] == {
        "tokens": [2, 1, 0],
        "flops": [2, 1, 0],
        "parameters": [0],
        "step_seconds": [0],
        "prefill_seconds": [0],
        "decode_seconds": [0],
    }
    assert data["fronts"]["locate"]["tokens"] == [2, 4, 1]
    assert data["axes"]["tokens"]["ticks"] == [4, 9, 16, 64]
    assert {name: style["control"] for name, style in data["styles"].items()} == {
        "mlp": False,
        "pool": False,
        "random": True,
        "downsample_image": True,
    }
    assert data["points"][0]["details"] == [
        "read: 90.0% [85.0, 94.0], n = 200",
        "locate: 50.0% [43.0, 57.0], n = 200",
        "visual tokens: 64",
        "GFLOPs: 0.721 (encoder 0.4, connector 0.001, prefill 0.32)",
        "parameters, M: 3.25 (encoder 1, connector 0.25, decoder 2)",
        "training step: 50 ms",
        "peak memory: 300 MiB",
        "prefill of an example: 2 ms",
        "new token of an example: 0.5 ms",
        "seeds: 0",
    ]
    assert "training step: not measured" in data["points"][2]["details"]


def test_the_selectors_offer_every_task_cost_and_answered_point(page):
    offered = {
        name: [option.attributes["value"] for option in one(page.all("select", id=name)).all("option")]
        for name in ("task", "axis", "shown")
    }
    assert offered == {
        "task": ["read", "locate"],
        "axis": ["tokens", "flops", "parameters", "step_seconds", "prefill_seconds", "decode_seconds"],
        "shown": ["mlp@64", "pool@16", "pool@4"],
    }
    assert [option.text for option in one(page.all("select", id="shown")).all("option")] == [
        "mlp@64: 1 of these 2 right",
        "pool@16: 1 of these 2 right",
        "pool@4: 0 of these 1 right",
    ]


def test_what_the_summary_says(page):
    read, locate = one(page.all("section", id="summary")).all("li")
    assert [p.text for p in read.all("p")] == [
        "Best: mlp at 64 tokens, 90.0% [85.0, 94.0].",
        "Fewest tokens within the interval of the best read accuracy: pool at 16 tokens, 88.0% [83.0, 92.0], "
        "for 25% of the best's tokens and 66.7% of its FLOPs.",
        "Fewest FLOPs within it: pool at 16 tokens, 88.0% [83.0, 92.0], 0.481 GFLOPs.",
        "Within 1 point of mlp at 64 tokens: mlp at 64 tokens.",
        "Within 5 points of mlp at 64 tokens: pool at 16 tokens.",
        "No control is within it with 16 tokens or fewer; the nearest is random at 16 tokens, 50.0% [43.0, 57.0].",
    ]
    assert [p.text for p in locate.all("p")] == [
        "Best: pool at 16 tokens, 60.0% [53.0, 67.0].",
        "No candidate with fewer tokens is within the interval of the best locate accuracy.",
        "Fewest FLOPs within it: pool at 16 tokens, 60.0% [53.0, 67.0], 0.481 GFLOPs.",
        "Within 1 point of mlp at 64 tokens: pool at 16 tokens.",
        "Within 5 points of mlp at 64 tokens: pool at 16 tokens.",
        "A control is as good with 16 tokens or fewer: downsample_image at 9 tokens, 55.0% [48.0, 62.0].",
    ]


def corners(rect):
    x, y, width, height = (float(rect.attributes[name]) for name in ("x", "y", "width", "height"))
    return pytest.approx((x, y, x + width, y + height))


def test_boxes_are_drawn_where_the_text_puts_them(page):
    located, read = page.all("article")
    svg = one(located.all("svg"))
    assert svg.attributes["viewbox"] == f"0 0 {WIDTH} {HEIGHT}"
    reference, answered = (to_pixels(parse_boxes(text)[0], HEIGHT, WIDTH) for text in (REFERENCE, ANSWERED))
    assert [corners(rect) for rect in svg.all("rect", class_="reference")] == [reference]
    drawn = {g.attributes["data-label"]: [corners(rect) for rect in g.all("rect")] for g in svg.all("g")}
    assert drawn == {"mlp@64": [answered], "pool@16": [], "pool@4": [answered, reference]}
    assert list(read.all("rect")) == []


def test_pages_are_shown_pixel_for_pixel(page):
    for article, example in zip(page.all("article"), EXAMPLES, strict=True):
        source = one(article.all("img")).attributes["src"]
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            shown = np.asarray(picture).reshape(HEIGHT, WIDTH, -1)
        np.testing.assert_array_equal(shown, example.image)


def test_an_answer_of_nothing_says_so(page):
    assert [dd.text for dd in list(page.all("article"))[1].all("dd", data_label="mlp@64")] == ["(nothing) ✗ wrong"]


def test_an_answer_that_is_partly_right_says_how_much(tmp_path):
    answers = {"mlp@64": ("74x9", 0.75), "pool@16": ("7419", 1.0), "pool@4": ("", 0.0)}
    page = report(tmp_path, examples=[Example(PIXELS, "READ 1 BY 4", "7419", "ocr:1x4", answers)])
    found = [one(page.all("dd", data_label=label)) for label in answers]
    said = {dd.attributes["data-label"]: (dd.attributes["class"], dd.text) for dd in found}
    assert said == {
        "mlp@64": ("said wrong", "74x9 75.0% right"),
        "pool@16": ("said right", "7419 ✓ right"),
        "pool@4": ("said wrong", "(nothing) ✗ wrong"),
    }
    counted = [option.text for option in one(page.all("select", id="shown")).all("option")]
    assert counted == ["mlp@64: 0 of these 1 right", "pool@16: 1 of these 1 right", "pool@4: 0 of these 1 right"]


def test_one_point_without_examples(tmp_path):
    page = report(tmp_path, [result("pool", 16, {"vqa": (0.5, 0.4, 0.6)})], examples=[])
    assert list(page.all("section", id="examples")) == []
    assert [p.text for p in one(page.all("li")).all("p")] == [
        "Best: pool at 16 tokens, 50.0% [40.0, 60.0].",
        "No candidate with fewer tokens is within the interval of the best vqa accuracy.",
        "Fewest FLOPs within it: pool at 16 tokens, 50.0% [40.0, 60.0], 0.481 GFLOPs.",
        "Within 1 point of pool at 16 tokens: pool at 16 tokens.",
        "Within 5 points of pool at 16 tokens: pool at 16 tokens.",
        "No control was measured with 16 tokens or fewer.",
    ]


def test_every_seed_has_its_row_its_dot_and_its_fewest_tokens(tmp_path):
    shares = {64: (0.9, 0.8), 16: (0.87, 0.7), 4: (0.6, 0.78)}
    runs = [
        result("pool", tokens, {"vqa": (mean, 0, 1)}, seed=seed, command=f"make --seed={seed} {tokens}")
        for tokens, means in shares.items()
        for seed, mean in enumerate(means)
    ]
    page = report(tmp_path, runs, examples=[])
    commands = [f"make --seed={seed} {tokens}" for tokens in shares for seed in (0, 1)]
    assert [code.text for code in one(page.all("tbody")).all("code")] == commands
    said = [p.text for p in one(page.all("li")).all("p")]
    assert said[0].startswith("Best: pool at 64 tokens, 85.0% [")
    assert said[3:5] == [
        "Within 1 point of pool at 64 tokens: pool at 64 tokens (64, 64 by seed).",
        "Within 5 points of pool at 64 tokens: pool at 64 tokens (16, 4 by seed).",
    ]
    data = json.loads(one(page.all("script", id="data")).text)
    assert data["several_seeds"]
    assert data["points"][1]["accuracy"]["vqa"]["seeds"] == {"0": 0.87, "1": 0.7}


def test_questions_that_a_smaller_picture_cannot_answer_are_scored_by_themselves(tmp_path):
    right = {  # of five questions in order
        "downsample_image@4": (True, False, False, True, False),
        "pool@4": (False, True, True, False, False),
        "pool@16": (True, True, True, True, True),
    }
    runs = [
        result(label.split("@")[0], int(label.split("@")[1]), {"vqa": (0.4, 0, 1)}) | {"label": label}
        for label in right
    ]

    def answers(label):
        return [{"sample_id": n, "task": "vqa", "correct": correct} for n, correct in enumerate(right[label])]

    lines = with_hard_questions(runs, "downsample_image", answers)
    assert [line["hard_accuracy"].get("vqa", {}).get("mean") for line in lines] == [0, 2 / 3, None]
    page = report(tmp_path, lines, examples=[])
    cells = {
        one(row.all("th")).text: one(row.all("td")).text
        for row in one(page.all("section", id="hard")).all("tr")
        if list(row.all("td"))
    }
    low, high = (f"{100 * end:.1f}" for end in wilson_interval(2, 3))
    assert cells["pool@4"] == f"66.7[{low}, {high}], n = 3"
    assert set(cells) == {"downsample_image@4 control", "pool@4"}
    # Where answers are partly right, the control has not answered what it gets partly right.
    right = {label: [0.5 * share + 0.5 for share in shares] for label, shares in right.items()}
    lines = with_hard_questions(runs, "downsample_image", answers)
    assert [line["hard_accuracy"].get("vqa", {}).get("mean") for line in lines] == [0.5, 2.5 / 3, None]
    right["pool@4"] = right["pool@4"][:4]
    with pytest.raises(ValueError, match="zip"):
        with_hard_questions(runs, "downsample_image", answers)


def test_controls_alone_are_no_candidates(tmp_path):
    page = report(tmp_path, [result("random", 16, {"vqa": (0.5, 0.4, 0.6)})], examples=[])
    assert "Only controls were measured." in one(page.all("section", id="summary")).text


def test_what_cannot_be_reported_is_refused_and_nothing_is_written(tmp_path):
    path = epath.Path(tmp_path) / "report.html"
    with pytest.raises(ValueError, match="nothing to report: 0 results"):
        write_report([], path, controls=CONTROLS, examples=EXAMPLES, title="none")
    four = Example(np.zeros((4, 4, 4), np.uint8), "q", "a", "vqa", {})
    with pytest.raises(ValueError, match=r"1 or 3 channels, got shape \(4, 4, 4\)"):
        write_report(RESULTS, path, controls=CONTROLS, examples=[four], title="none")
    assert list(tmp_path.iterdir()) == []


def test_the_pages_files_are_packaged():
    root = pathlib.Path(__file__).parents[2]
    shipped = re.search(r'"vlm_jax.sweep": (\[.*\])', (root / "setup.py").read_text())
    assert shipped is not None
    files = {file.name for file in (root / "vlm_jax" / "sweep").iterdir() if file.suffix not in {".py", ""}}
    assert set(json.loads(shipped[1])) == files
