"""The digits sweep's tables in the pages are those of its results file."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "digits_token_budget"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("digits_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_results_of_the_file(table):
    for name, text in table.sections().items():
        assert table.shown(table.PAGES[name]) == text


def test_the_table_of_the_overview_has_the_means_of_the_file(table):
    """Means are computed here from the lines of the file."""
    lines = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    rows = [row.strip("| ").split("|") for row in table.shown(table.PAGES["overview"]).splitlines() if row[:1] == "|"]
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
