"""The digits sweep's tables in the pages are those of its results file."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from vlm_jax.sweep.frontier import Accuracy, FrontierPoint
from vlm_jax.sweep.pages import show, shown

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "digits_token_budget"
DOCUMENTS = FOLDER.parent / "document_reading"


def loaded(name, folder=FOLDER):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    return loaded("table")


@pytest.fixture(scope="module")
def agreement():
    return loaded("agreement")


def test_pages_show_the_results_of_the_file(table):
    for name, text in table.sections().items():
        assert shown(table.PAGES[name]) == text


def test_the_page_of_documents_shows_the_results_of_its_file():
    assert shown(DOCUMENTS / "README.md") == loaded("figure", DOCUMENTS).section()
    first = json.loads((DOCUMENTS / "results.jsonl").read_text().splitlines()[0])
    percent = 100 * first["accuracy"]["ocr_line:4x4"]["mean"]
    name, tokens = first["connector"], first["token_budget"]
    assert f"| 16 | `{name}` | {tokens} | {16 / tokens:g} | {percent:.1f} [" in shown(DOCUMENTS / "README.md")


def test_the_table_of_the_overview_has_the_means_of_the_file(table):
    """Means are computed here from the lines of the file."""
    lines = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    rows = [row.strip("| ").split("|") for row in shown(table.PAGES["overview"]).splitlines() if row[:1] == "|"]
    names = [cell.replace("control:", "").strip(" `") for cell in rows[0][1:]]
    compared = 0
    for row in rows[2:]:
        for name, cell in zip(names, row[1:], strict=False):
            shares = [
                line["accuracy"]["read"]["mean"]
                for line in lines
                if (line["connector"], line["token_budget"]) == (name, int(row[0]))
            ]
            assert bool(shares) == bool(cell.strip())
            if shares:
                compared += 1
                assert float(cell.split("[")[0]) == pytest.approx(100 * np.mean(shares), abs=0.051)
    assert compared == len({(line["connector"], line["token_budget"]) for line in lines})


@pytest.mark.parametrize(("half", "same"), [(0.05, False), (0.08, True)])
def test_means_differ_where_the_interval_of_their_difference_misses_zero(agreement, half, same):
    """arcsin(sqrt) of 0.5 and 0.6 are 0.1007 apart; about 0.5 a half-width of 0.05 is one of 0.05 radians."""
    one, other = (Accuracy(mean, mean - half, mean + half, 100, {}) for mean in (0.5, 0.6))
    assert agreement.same_mean(one, other) == agreement.same_mean(other, one) == same


def test_runs_agree_in_points_and_in_the_order_of_candidates(agreement):
    def points(**means):
        runs = ({"token_budget": 4},)
        return [
            FrontierPoint(f"{name}@4", name, {}, {"read": Accuracy(mean, mean - 0.05, mean + 0.05, 100, {})}, {}, runs)
            for name, mean in means.items()
        ]

    here, there = points(mlp=0.8, pool=0.6, random=0.5, only_here=0.1), points(mlp=0.8, pool=0.9, random=0.55)
    # The intervals of pool and random touch here, so that two pairs are compared: mlp is no more above pool there.
    assert agreement.agreement(here, there, "read") == {"points": (2, 3), "order": (1, 2)}


def test_what_stands_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- results -->\nold\n<!-- end of results -->\nrest\n")
    show(page, "new\n")
    assert page.read_text() == "# Title\n<!-- results -->\nnew\n<!-- end of results -->\nrest\n"
    assert shown(page) == "new\n"
    page.write_text("# Title\n<!-- results -->\n")
    with pytest.raises(ValueError, match=r"page\.md: expected one line '<!-- end of results -->', got 0"):
        show(page, "new\n")
    assert page.read_text() == "# Title\n<!-- results -->\n"
